"""The report of one run or several: held-out curves and a table of before and after."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError

ROWS = (
    ("rewards/accuracies", "accuracy", "{:z.3f}"),
    ("rewards/margins", "reward margin", "{:z.3f}"),
    ("rewards/chosen", "chosen reward", "{:z.3f}"),
    ("rewards/rejected", "rejected reward", "{:z.3f}"),
    ("logps/chosen", "chosen log-prob (nats)", "{:z.2f}"),
    ("logps/rejected", "rejected log-prob (nats)", "{:z.2f}"),
    ("logps/accuracies", "P(chosen) > P(rejected)", "{:z.3f}"),
    ("kl", "KL to reference (nats/token)", "{:z.4f}"),
    ("loss", "loss", "{:z.4f}"),
)
"""Metric -> how a table calls and prints it."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder, read."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]

    def curve(self, stage: str, split: str, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric; empty where it was not recorded."""
        points = [
            (line["step"], line[metric])
            for line in self.lines
            if line["stage"] == stage and line["split"] == split and line.get(metric) is not None
        ]
        return [step for step, _ in points], [value for _, value in points]

    def first_and_last(self, stage: str, metric: str) -> tuple[float, float] | None:
        """The held-out value before the stage's first step and after its last."""
        _, values = self.curve(stage, "eval", metric)
        return (values[0], values[-1]) if values else None


def read_run(folder: Path | str) -> Run:
    """Read a run folder.

    Raises:
      UserError: it is not one.
    """
    folder = Path(folder)
    for name in ("config.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name}; give a folder that jaxalign train has made")
    lines = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the line a kill cut short
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Run(folder=folder, name=config["name"], config=config, lines=lines)


def comparison(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: a line per metric, before and after for every run."""
    header = ["held-out pairs"]
    for run in runs:
        header += [f"{run.name} before", f"{run.name} after"]
    rows = []
    for metric, label, form in ROWS:
        values = [run.first_and_last("preference", metric) for run in runs]
        if any(value is not None for value in values):
            cells = [form.format(v) for value in values for v in (value or (float("nan"),) * 2)]
            rows.append([label, *cells])
    return header, rows


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def _plot_preference(runs: Sequence[Run], path: Path) -> None:
    """Held-out log-probs, reward margin and accuracy over the steps of the preference stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for index, run in enumerate(runs):
        colour = colours[index % len(colours)]
        label = run.name if len(runs) > 1 else None
        for metric, style in (("logps/chosen", "-"), ("logps/rejected", "--")):
            side = metric.split("/")[1]
            left.plot(
                *run.curve("preference", "eval", metric),
                style,
                color=colour,
                marker=".",
                label=f"{run.name}: {side}" if len(runs) > 1 else side,
            )
        middle.plot(
            *run.curve("preference", "eval", "rewards/margins"),
            color=colour,
            marker=".",
            label=label,
        )
        right.plot(
            *run.curve("preference", "eval", "rewards/accuracies"),
            color=colour,
            marker=".",
            label=label,
        )
    titles = ("Log-prob of the response", "Reward margin", "Reward accuracy")
    units = ("nats, summed over tokens", "chosen − rejected", "share of held-out pairs")
    for axis, title, unit in zip((left, middle, right), titles, units, strict=True):
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    right.axhline(0.5, color="grey", linewidth=0.8)
    if len(runs) > 1:
        right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_losses(runs: Sequence[Run], path: Path) -> list[str]:
    """Training and held-out loss of every stage; returns the stages that were drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stages = [
        stage
        for stage in ("pretrain", "sft", "preference")
        if any(run.curve(stage, "train", "loss")[0] for run in runs)
    ]
    if not stages:
        return []
    figure, axes = plt.subplots(
        1, len(stages), figsize=(4 * len(stages), 3.4), layout="constrained", squeeze=False
    )
    for axis, stage in zip(axes[0], stages, strict=True):
        for run in runs:
            line = axis.plot(
                *run.curve(stage, "train", "loss"),
                linewidth=0.8,
                alpha=0.6,
                label=f"{run.name}: train" if len(runs) > 1 else "train",
            )[0]
            axis.plot(
                *run.curve(stage, "eval", "loss"),
                marker=".",
                color=line.get_color(),
                label=f"{run.name}: held out" if len(runs) > 1 else "held out",
            )
        axis.set(title=stage, xlabel="step", ylabel="loss")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return stages


def write_report(runs: Sequence[Run], folder: Path) -> Path:
    """Write `report.md` and its plots.

    Args:
      runs: one run or several; several are drawn into the same axes.
      folder: made where it is missing.

    Returns:
      The path of `report.md`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    header, rows = comparison(runs)
    text = [f"# {', '.join(run.name for run in runs)}\n"]
    if rows:
        _plot_preference(runs, folder / "preference.png")
        text += [_markdown_table(header, rows), "![held-out curves](preference.png)\n"]
    if _plot_losses(runs, folder / "loss.png"):
        text.append("![loss by stage](loss.png)\n")
    for run in runs:
        data = run.folder / "data.json"
        if data.exists():
            text.append(f"## Data of {run.name}\n\n```json\n{data.read_text().strip()}\n```\n")
    path = folder / "report.md"
    path.write_text("\n".join(text), encoding="utf-8")
    return path
