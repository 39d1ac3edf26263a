"""Each cure against plain DPO on the same pairs, compared at the same margin.

Command:  python -m experiments.gradient_entanglement.cures [--model FOLDER] [--scale paper]
Time:     a quarter of an hour on two CPU cores
Expect:   the section "Cures" of this folder's README, and cures.png

Runs differ in how fast their margin grows; a table at the last step would compare speeds. So every
run is read where its held-out margin (log-ratio of chosen less that of rejected) has grown by the
same number of nats: the growth that the slowest form of DPO reaches. Other losses that do not get
so far are read at their last step.
"""

from pathlib import Path

import numpy as np

from experiments.gradient_entanglement.pairs import arguments, settings
from experiments.page import put, table
from experiments.runs import finished, mean
from jaxalign.config import EntanglementConfig
from jaxalign.reporting import read_run

FOLDER = Path(__file__).parent

CURES: dict[str, tuple[str, dict[str, float], EntanglementConfig]] = {
    "dpo": ("dpo", {"beta": 0.1}, EntanglementConfig(every=1)),
    "dpo, normalised": (
        "dpo",
        {"beta": 0.1},
        EntanglementConfig(every=1, reweighting="normalised"),
    ),
    "dpo, centred": ("dpo", {"beta": 0.1}, EntanglementConfig(every=1, reweighting="centred")),
    "dpo, differing tokens": ("dpo", {"beta": 0.1}, EntanglementConfig(every=1, mask="differing")),
    "dpo, learned mask": (
        "dpo",
        {"beta": 0.1},
        EntanglementConfig(every=1, mask="learned", mask_learning_rate=0.1),
    ),
    "dpop": ("dpop", {"beta": 0.1}, EntanglementConfig(every=1)),
    "rpo": ("rpo", {"beta": 0.1}, EntanglementConfig(every=1)),
    "dpo_shift": ("dpo_shift", {"beta": 0.1}, EntanglementConfig(every=1)),
    "cal_dpo": ("cal_dpo", {}, EntanglementConfig(every=1)),
}
"""Name -> loss, its hyperparameters, and what is done to its gradients or tokens."""


def held_out(folder: Path) -> dict[str, np.ndarray]:
    """Held-out curves as changes from the start; accuracy as it is."""
    run = read_run(folder)
    curves = {
        side: np.array(run.curve("preference", "eval", f"logps/{side}")[1])
        for side in ("chosen", "rejected")
    }
    curves = {side: values - values[0] for side, values in curves.items()}
    steps, accuracy = run.curve("preference", "eval", "rewards/accuracies")
    margin = curves["chosen"] - curves["rejected"]
    return curves | {"margin": margin, "accuracy": np.array(accuracy), "step": np.array(steps)}


def at_margin(curves: dict[str, np.ndarray], margin: float) -> dict[str, float]:
    """All curves where the margin first reaches a value, linear in between, or at their end."""
    reached = np.flatnonzero(curves["margin"] >= margin)
    if not len(reached):
        return {name: float(x[-1]) for name, x in curves.items()}
    last = max(1, reached[0])
    low, high = curves["margin"][last - 1], curves["margin"][last]
    share = (margin - low) / (high - low)
    return {
        name: float(x[last - 1] + share * (x[last] - x[last - 1])) for name, x in curves.items()
    }


def main() -> None:
    """Run what is missing, then write the section and the figure."""
    start, scale = arguments(__doc__)
    folders = {}
    for name, (loss, options, watch) in CURES.items():
        label = "cure_" + name.replace(", ", "_").replace(" ", "_")
        folders[name] = finished(settings(label, start, scale, loss, options, entanglement=watch))
    curves = {name: held_out(folder) for name, folder in folders.items()}
    margin = min(x["margin"].max() for name, x in curves.items() if CURES[name][0] == "dpo")
    rows = []
    for name, folder in folders.items():
        at = at_margin(curves[name], margin)
        kept = read_run(folder).curve("preference", "train", "mask/chosen")[1]
        rows.append(
            [
                name,
                f"{at['margin']:.2f}",
                f"{at['step']:.0f}",
                f"{at['chosen']:+.2f}",
                f"{at['rejected']:+.2f}",
                f"{at['accuracy']:.3f}",
                f"{mean(folder, 'cosine'):.3f}",
                f"{mean(folder, 'ideal'):.0%}",
                f"{mean(folder, 'both_down'):.0%}",
                f"{np.mean(kept):.0%}" if kept else "",
            ]
        )
    header = (
        "DPO and its cures",
        "Δ margin (nats)",
        "step",
        "Δ chosen",
        "Δ rejected",
        "accuracy",
        "cosine",
        "pairs' own case: ideal",
        "both down",
        "tokens kept",
    )
    text = table(header, rows)
    print(text)
    plot(curves, margin)
    put(FOLDER, "cures", f"{text}\n![cures](cures.png)\n")


def plot(curves: dict[str, dict[str, np.ndarray]], margin: float) -> None:
    """Chosen and rejected against the margin: what a nat of margin is made of."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharex=True)
    for axis, side in zip(axes, ("chosen", "rejected"), strict=True):
        for number, (name, x) in enumerate(curves.items()):
            style = {"linestyle": "-" if number < 5 else "--", "marker": "."}
            axis.plot(x["margin"], x[side], label=name, color=f"C{number}", **style)
        axis.axvline(margin, color="grey", linewidth=0.8)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set(title=side, xlabel="growth of the held-out margin (nats)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("change of the held-out log-prob (nats)")
    axes[0].legend(fontsize=8)
    figure.savefig(FOLDER / "cures.png", dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
