"""The bandits of the IPO paper: three actions, a handful of comparisons, IPO beside DPO.

Command:  python -m experiments.ipo_md.bandits
Time:     about two minutes on two cores
Expect:   the section "Bandits" of this folder's README, and bandits.png
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import optax
from scipy.special import softmax

from experiments.page import put, table
from jaxalign.games import contrastive, fixed, game, learn
from jaxalign.losses import PreferenceLoss, dpo, ipo

FOLDER = Path(__file__).parent
ACTIONS = "abc"
UNIFORM = np.ones(3) / 3
TAUS = (0.1, 0.5, 1.0)
SEEDS, STEPS, EVERY, BATCH, RATE = 10, 18_000, 200, 9, 0.01
T_9 = 2.262  # the 97.5 % quantile of Student's t with nine degrees of freedom

DATA = {  # comparisons (winner, loser)
    "D1: ab, bc, ac": ("ab", "bc", "ac"),
    "D2: ab, bc, ca": ("ab", "bc", "ca"),
    "D3: ab, ba": ("ab", "ba"),
    "D3′: ab, ba, ac": ("ab", "ba", "ac"),
}


def comparisons(data: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """How often an ordered pair is drawn, and how often its first action wins, each [3, 3].

    Drawing a pair and then its label by that rate is drawing a comparison from the data.
    """
    wins = np.zeros((3, 3))
    for winner, loser in data:
        wins[ACTIONS.index(winner), ACTIONS.index(loser)] += 1
    both = wins + wins.T
    rates = np.where(both > 0, wins / np.maximum(both, 1), 0.5)
    return both, rates


def exact_ipo(data: Sequence[str], tau: float) -> np.ndarray:
    """What IPO converges to: least squares of gaps of logits on (rate - 1/2) / tau, from zero."""
    both, rates = comparisons(data)
    pairs = [(i, j) for i in range(3) for j in range(i) if both[i, j]]
    weight = np.sqrt([both[pair] for pair in pairs])
    gaps = np.array([np.eye(3)[i] - np.eye(3)[j] for i, j in pairs])
    targets = np.array([(rates[pair] - 0.5) / tau for pair in pairs])
    logits, *_ = np.linalg.lstsq(weight[:, None] * gaps, weight * targets, rcond=None)
    return softmax(logits)


def simulated(
    loss: PreferenceLoss,
    data: Sequence[str],
    *,
    seeds: int,
    steps: int,
    every: int,
    **options: float,
) -> np.ndarray:
    """Action probabilities on the way, [seeds, 1 + steps / every, actions]."""
    both, rates = comparisons(data)
    algorithm = contrastive(loss, fixed(both), **options)
    world, optimizer = game(rates, UNIFORM), optax.adam(RATE)

    def run(key):
        return learn(
            algorithm,
            world,
            optimizer,
            steps=steps,
            every=every,
            key=key,
            pairs=BATCH,
            hard_labels=True,
        )

    return np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), seeds)))


def interval(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the seeds and the half-width of its 95 % interval."""
    return curves.mean(axis=0), T_9 * curves.std(axis=0, ddof=1) / np.sqrt(len(curves))


def main() -> None:
    """Simulate, print, write the section and the figure."""
    sizes = {"seeds": SEEDS, "steps": STEPS, "every": EVERY}
    curves = {
        (name, tau): (
            simulated(ipo, data, **sizes, tau=tau),
            simulated(dpo, data, **sizes, beta=tau),
        )
        for name, data in DATA.items()
        for tau in TAUS
    }
    rows = []
    for (name, tau), found in curves.items():
        exact = " ".join(f"{p:.4f}" for p in exact_ipo(DATA[name], tau))
        rows.append([name, f"{tau:g}", exact, *(last(each) for each in found)])
    header = ("data", "τ", "IPO in closed form", "IPO", "DPO")
    text = table(header, rows)
    print(text)
    plot(curves)
    put(FOLDER, "bandits", f"{text}\n![bandits](bandits.png)\n")


def last(curves: np.ndarray) -> str:
    """Final probabilities of the actions, with intervals."""
    means, widths = interval(curves[:, -1])
    return ", ".join(f"{m:.3f} ± {w:.3f}" for m, w in zip(means, widths, strict=True))


def plot(curves: dict) -> None:
    """Rows of data sets, columns of tau; actions in colours, IPO solid, DPO dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    colours = ("#4c72b0", "#dd8452", "#55a868")
    figure, axes = plt.subplots(
        len(DATA), len(TAUS), figsize=(10, 9.5), sharex=True, sharey=True, layout="constrained"
    )
    steps = np.arange(0, STEPS + 1, EVERY) / 1000
    for (name, tau), found in curves.items():
        axis = axes[list(DATA).index(name), TAUS.index(tau)]
        for each, style in zip(found, ("-", "--"), strict=True):
            means, widths = interval(each)
            for action, colour in enumerate(colours):
                mean, width = means[:, action], widths[:, action]
                axis.plot(steps, mean, style, color=colour, linewidth=1.4)
                axis.fill_between(
                    steps, mean - width, mean + width, color=colour, alpha=0.2, linewidth=0
                )
        for action, colour in enumerate(colours):  # where IPO should end
            axis.plot(
                steps[-1] * 1.03,
                exact_ipo(DATA[name], tau)[action],
                "<",
                color=colour,
                markersize=5,
                clip_on=False,
            )
        axis.set_title(f"{name}, τ = {tau:g}", fontsize=9)
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("thousand steps")
    for axis in axes[:, 0]:
        axis.set_ylabel("probability")
    keys = [
        Line2D([], [], color=c, label=f"action {a}") for a, c in zip(ACTIONS, colours, strict=True)
    ]
    keys += [
        Line2D([], [], color="grey", linestyle="-", label="IPO"),
        Line2D([], [], color="grey", linestyle="--", label="DPO"),
        Line2D([], [], color="grey", marker="<", linestyle="", label="IPO in closed form"),
    ]
    figure.legend(handles=keys, loc="outside upper center", ncols=6, fontsize=9)
    figure.savefig(FOLDER / "bandits.png", dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main()
