"""The representation stage in a report: how far states moved, and what it did to held-out pairs."""

from collections.abc import Sequence
from pathlib import Path

from jaxalign.reporting.figures import save_figure
from jaxalign.reporting.runs import Run

STAGE = "representation"
ROWS = (
    ("loss", "distance to the target, a token", "{:z.4f}"),
    ("pattern/projection", "moved along the difference (alpha when done)", "{:z.3f}"),
    ("pattern/cosine", "cosine of the move and the difference", "{:z.3f}"),
    ("pattern/norm", "norm of the difference", "{:z.3f}"),
    ("pattern/drift", "norm of the move", "{:z.3f}"),
    ("pattern/base_norm", "norm of the base's states", "{:z.3f}"),
    ("rewards/accuracies", "accuracy", "{:z.3f}"),
    ("rewards/margins", "margin (nats)", "{:z.3f}"),
    ("logps/chosen", "chosen log-prob (nats)", "{:z.2f}"),
    ("logps/rejected", "rejected log-prob (nats)", "{:z.2f}"),
    ("kl", "KL to base (nats/token)", "{:z.4f}"),
)
"""Held-out metric -> how a table calls and prints it."""


def has_stage(run: Run) -> bool:
    """Whether a run got to this stage."""
    return any(line["stage"] == STAGE for line in run.lines)


def table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line per metric; before and after, or both in a column per run."""
    rows = []
    for metric, label, form in ROWS:
        ends = [run.first_and_last(STAGE, metric) for run in runs]
        if any(ends):
            cells = [[form.format(x) for x in both] if both else ["", ""] for both in ends]
            rows.append([label, *(cells[0] if len(runs) == 1 else map(" → ".join, cells))])
    names = ["before", "after"] if len(runs) == 1 else [run.name for run in runs]
    return ["held-out responses and pairs", *names], rows


def plot(runs: Sequence[Run], path: Path) -> None:
    """Held-out distance, projection and log-probs over the steps of the stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for run in runs:
        label = f"{run.name}: " if len(runs) > 1 else ""
        left.plot(*run.curve(STAGE, "eval", "loss"), marker=".", label=run.name)
        line = middle.plot(*run.curve(STAGE, "eval", "pattern/projection"), marker=".")[0]
        for side, style in (("chosen", "-"), ("rejected", "--")):
            curve = run.curve(STAGE, "eval", f"logps/{side}")
            right.plot(*curve, style, marker=".", color=line.get_color(), label=f"{label}{side}")
    left.set(title="Distance to the target", ylabel="a token")
    middle.set(title="Moved along the difference", ylabel="alpha when done")
    right.set(title="Log-prob of the response", ylabel="nats, summed over tokens")
    for axis in (left, middle, right):
        axis.set(xlabel="step")
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        left.legend(fontsize=8)
    right.legend(fontsize=8)
    save_figure(figure, path)
    plt.close(figure)
