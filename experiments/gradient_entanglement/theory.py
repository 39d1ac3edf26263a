"""The theory's settings E1 to E6: closed form beside autodiff beside one real gradient step.

Command:  python -m experiments.gradient_entanglement.theory
Time:     seconds
Expect:   the section "Theory" of this folder's README, and theory.png
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.gradient_entanglement.worlds import (
    World,
    by_autodiff,
    free_logits,
    last_layer,
    one_step,
    predicted,
    shared_logits,
    single_token,
)
from experiments.page import put, table

FOLDER = Path(__file__).parent
SEEDS = range(3)
SUFFIXES = (0, 10, 20, 50, 100, 150, 200)

SETTINGS: dict[str, Callable[[int], World]] = {
    "E1 single token, last layer": single_token,
    "E2 free logits, no prefix": lambda seed: free_logits(seed, prefix=0),
    "E2 free logits, prefix 9 of 10": lambda seed: free_logits(seed, prefix=9),
    "E3 shared logits, boosts 4 and 3": lambda seed: shared_logits(
        seed, boost_chosen=4.0, boost_rejected=3.0
    ),
    "E3 shared logits, boosts 5 and 3": lambda seed: shared_logits(
        seed, boost_chosen=5.0, boost_rejected=3.0
    ),
    "E4 last layer, suffix 10": lambda seed: last_layer(seed, suffix=10, likeness=0.9, steps=12),
    "E4 last layer, suffix 200": lambda seed: last_layer(seed, suffix=200, likeness=0.9, steps=12),
    "E5 prefix 3, suffix 6, rejected 5 longer": lambda seed: last_layer(
        seed, suffix=6, likeness=0.8, steps=4, prefix=3, extra_rejected=5
    ),
}


def main() -> None:
    """Compute, print, write the section and the figure."""
    rows = [setting(name, make) for name, make in SETTINGS.items()]
    header = (
        "setting",
        "cosine",
        "Δ chosen",
        "Δ rejected",
        "case",
        "autodiff off by",
        "real step off by",
        "normalised: Δ chosen",
        "Δ rejected",
    )
    text = table(header, rows)
    print(text)
    plot()
    put(FOLDER, "theory", f"{text}\n![suffix](theory.png)\n")


def setting(name: str, make: Callable[[int], World]) -> list[str]:
    """A row: means over three draws; the largest disagreement of three ways to the same number."""
    drawn = [make(seed) for seed in SEEDS]
    closed = np.array([world.closed for world in drawn])
    differentiated = np.array([by_autodiff(world) for world in drawn])
    changes = np.array([predicted(world) for world in drawn])
    realised = np.array([one_step(world) for world in drawn])
    cured = np.array([one_step(world, normalised(world)) for world in drawn])
    scale = np.sqrt(closed[:, :1] * closed[:, 1:2])
    cosine = float(np.mean(closed[:, 2:] / scale))
    chosen, rejected = changes.mean(axis=0)
    return [
        name,
        f"{cosine:z.2f}",
        f"{chosen:+z.2f}",
        f"{rejected:+z.2f}",
        case(chosen, rejected),
        f"{np.max(np.abs(closed - differentiated) / scale):.0e}",
        f"{np.max(np.abs(realised - changes) / scale):.0e}",
        *(f"{x:+.2g}" for x in cured.mean(axis=0)),
    ]


def normalised(world: World) -> tuple[float, float]:
    """The weights of pairwise normalised gradients."""
    n_w, n_l, _ = world.closed
    return n_w**-0.5, n_l**-0.5


def case(chosen: float, rejected: float) -> str:
    """The case by the signs of the two changes."""
    if chosen > 0:
        return "ideal" if rejected < 0 else "both up"
    return "both down" if rejected < 0 else "reversed"


def plot() -> None:
    """E4: what a DPO step does as the identical suffix grows, and what normalised gradients do."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for likeness, style in ((0.9, "-"), (0.95, "--")):
        worlds = [
            [last_layer(seed, suffix=suffix, likeness=likeness, steps=12) for seed in SEEDS]
            for suffix in SUFFIXES
        ]

        def mean(function, worlds=worlds):
            return np.array([np.mean([function(w) for w in row], axis=0) for row in worlds])

        plain, cured = mean(predicted), mean(lambda w: predicted(w, normalised(w)))
        cosines = mean(lambda w: w.closed[2] / np.sqrt(w.closed[0] * w.closed[1]))
        label = f"likeness {likeness}"
        axes[0].plot(SUFFIXES, cosines, style, color="#4c72b0", marker=".", label=label)
        for axis, changes in ((axes[1], plain), (axes[2], cured)):
            axis.plot(
                SUFFIXES,
                changes[:, 0],
                style,
                color="#4c9f70",
                marker=".",
                label=f"chosen, {label}",
            )
            axis.plot(
                SUFFIXES,
                changes[:, 1],
                style,
                color="#c44e52",
                marker=".",
                label=f"rejected, {label}",
            )
    titles = ("Cosine of the gradients", "A DPO step", "Normalised gradients")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="identical tokens after the differing one")
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[1].set_ylabel("change of log-prob over step size")
    figure.savefig(FOLDER / "theory.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
