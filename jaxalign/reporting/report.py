"""The report of one run or several: held-out curves and a table of before and after."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.files import check_output, write_text
from jaxalign.reporting import entanglement, online, representation
from jaxalign.reporting.figures import save_figure
from jaxalign.reporting.runs import Run

ROWS = (
    ("rewards/accuracies", "accuracy", "{:z.3f}"),
    ("rewards/margins", "reward margin", "{:z.3f}"),
    ("rewards/chosen", "chosen reward", "{:z.3f}"),
    ("rewards/rejected", "rejected reward", "{:z.3f}"),
    ("logps/chosen", "chosen log-prob (nats)", "{:z.2f}"),
    ("logps/rejected", "rejected log-prob (nats)", "{:z.2f}"),
    ("logps/accuracies", "P(chosen) > P(rejected)", "{:z.3f}"),
    ("logps/mean_accuracies", "the same, per token", "{:z.3f}"),
    ("kl", "KL to reference (nats/token)", "{:z.4f}"),
    ("preferences/consistency", "both orders name one winner", "{:z.3f}"),
    ("calibration/error", "calibration error", "{:z.3f}"),
    ("loss", "loss", "{:z.4f}"),
)
"""Metric -> how a table calls and prints it."""


def comparison(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: a line per metric, a column or two per run."""
    shown = [row for row in ROWS if any(run.first_and_last("preference", row[0]) for run in runs)]
    if len(runs) == 1:
        rows = [[label, *runs[0].cells(metric, form)] for metric, label, form in shown]
        return ["held-out pairs", "before", "after"], rows
    rows = [
        [label, *(" → ".join(run.cells(metric, form)) for run in runs)]
        for metric, label, form in shown
    ]
    return ["held-out pairs", *(run.name for run in runs)], rows


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def _data_table(run: Run) -> str:
    """What was read, skipped and tokenised; counts of 0 are left out."""
    lines = ["| what | source | counts |", "|---|---|---|"]
    for name, counts in run.data.items():
        parts = [f"{value:,} {key.replace('_', ' ')}" for key, value in _numbers(counts)]
        places = counts.get("first", {})
        parts += [
            f"{number:,} skipped for {reason} (first: {places.get(reason, '?')})"
            for reason, number in counts.get("skipped", {}).items()
        ]
        parts += [line.replace("|", "\\|") for line in counts.get("chat", [])]
        lines.append(
            f"| {name.replace('_', ' ')} | {counts.get('source', '')} | {'; '.join(parts)} |"
        )
    return "\n".join(lines) + "\n"


def _numbers(counts: Mapping[str, Any]) -> list[tuple[str, int]]:
    return [(key, value) for key, value in counts.items() if isinstance(value, int) and value]


def _plot_preference(runs: Sequence[Run], path: Path) -> None:
    """Held-out log-probs, reward margin and accuracy over the steps of the preference stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    # reward models have no log-probs
    of_policies = any(run.curve("preference", "eval", "logps/chosen")[0] for run in runs)
    shown = "logps" if of_policies else "rewards"
    has_rewards = all(run.curve("preference", "eval", "rewards/margins")[0] for run in runs)
    accuracy = "rewards/accuracies" if has_rewards else "logps/mean_accuracies"
    for index, run in enumerate(runs):
        colour = colours[index % len(colours)]
        label = run.name if len(runs) > 1 else None
        for metric, style in ((f"{shown}/chosen", "-"), (f"{shown}/rejected", "--")):
            side = metric.split("/")[1]
            left.plot(
                *run.curve("preference", "eval", metric),
                style,
                color=colour,
                marker=".",
                label=f"{run.name}: {side}" if len(runs) > 1 else side,
            )
        own_units = (len(runs) == 1 and has_rewards) or not of_policies
        middle.plot(*_margin(run, own_units=own_units), color=colour, marker=".", label=label)
        right.plot(
            *run.curve("preference", "eval", accuracy),
            color=colour,
            marker=".",
            label=label,
        )
    margins = ("Reward margin", "chosen − rejected")
    if of_policies and not (len(runs) == 1 and has_rewards):  # rewards have units of their own
        margins = ("Log-prob margin, change from the start", "nats, chosen − rejected")
    first = ("Log-prob of the response", "nats, summed over tokens")
    first = first if of_policies else ("Reward of the response", "reward")
    titles = (first[0], margins[0], "Reward accuracy" if has_rewards else "Accuracy per token")
    units = (first[1], margins[1], "share of held-out pairs")
    for axis, title, unit in zip((left, middle, right), titles, units, strict=True):
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    right.axhline(0.5, color="grey", linewidth=0.8)
    if len(runs) > 1:
        right.legend(fontsize=8)
    save_figure(figure, path)
    plt.close(figure)


def _margin(run: Run, *, own_units: bool) -> tuple[list[int], list[float]]:
    """The reward margin; or in nats, the gap of log-probs less what it was at the start."""
    if own_units:
        return run.curve("preference", "eval", "rewards/margins")
    steps, chosen = run.curve("preference", "eval", "logps/chosen")
    _, rejected = run.curve("preference", "eval", "logps/rejected")
    gaps = [c - r for c, r in zip(chosen, rejected, strict=True)]
    return steps, [gap - gaps[0] for gap in gaps]


def _without_reference(run: Run) -> str:
    """Why a run of log-probs has no rewards, if it has none."""
    if not run.first_and_last("preference", "logps/chosen"):
        return ""
    if run.first_and_last("preference", "rewards/margins"):
        return ""
    return (
        f"{run.name}: its loss reads no reference, so none was kept or evaluated, and there are no "
        "rewards and no KL; `--reference live` adds them.\n"
    )


def _calibration_table(run: Run) -> str:
    """How often the winners named with about the same confidence were the right ones."""
    last = [line for line in run.lines if (line["stage"], line["split"]) == ("preference", "eval")]
    values = last[-1] if last else {}
    rows = [
        [
            f"{name.split('/')[1]} and above",
            f"{values[name]:.0f}",
            *(f"{values[name.replace('pairs', of)]:.3f}" for of in ("confidence", "accuracy")),
        ]
        for name in values
        if name.startswith("calibration/") and name.endswith("/pairs")
    ]
    header = ["confidence", "pairs", "mean confidence", "accuracy"]
    return f"## Calibration of {run.name}\n\n{_markdown_table(header, rows)}" if rows else ""


def _plot_losses(runs: Sequence[Run], path: Path) -> list[str]:
    """Training and held-out loss of every stage; returns the stages that were drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stages = [
        stage
        for stage in ("pretrain", "sft", "preference", "online", "representation")
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
    save_figure(figure, path)
    plt.close(figure)
    return stages


def skipped_updates(run: Run) -> list[str]:
    """A line for each stage of which updates were skipped, as their loss was not finite."""
    last = {line["stage"]: line for line in run.lines if line["split"] == "train"}
    return [
        f"{stage}: {line['skipped']:.0f} of {line['step']:,} updates were not finite and were "
        "skipped"
        for stage, line in last.items()
        if line.get("skipped")
    ]


def write_report(runs: Sequence[Run], folder: Path) -> Path:
    """Write `report.md` and its plots.

    Args:
      runs: one run or several; several are drawn into the same axes.
      folder: made where it is missing.

    Returns:
      The path of `report.md`.
    """
    check_output(folder, "--output", folder=True)
    header, rows = comparison(runs)
    text = [f"# {', '.join(run.name for run in runs)}\n"]
    if rows:
        _plot_preference(runs, folder / "preference.png")
        text += [
            _markdown_table(header, rows),
            *filter(None, map(_without_reference, runs)),
            "![held-out curves](preference.png)\n",
        ]
    if sampled := [run for run in runs if online.has_stage(run)]:
        online.plot(sampled, folder / "online.png")
        text += [
            _markdown_table(*online.table(sampled)),
            "![held-out prompts](online.png)\n",
            *filter(None, map(online.samples, sampled)),
        ]
    if aligned := [run for run in runs if representation.has_stage(run)]:
        representation.plot(aligned, folder / "representation.png")
        text += [
            _markdown_table(*representation.table(aligned)),
            "![hidden states](representation.png)\n",
        ]
    if seen := [run for run in runs if entanglement.watched(run)]:
        entanglement.plot(seen, folder / "entanglement.png")
        text += [
            "## Gradients of chosen and rejected\n",
            "Means over the watched steps; over all trained parameters, before each update.\n",
            _markdown_table(*entanglement.table(seen)),
            "![entanglement](entanglement.png)\n",
        ]
    if _plot_losses(runs, folder / "loss.png"):
        text.append("![loss by stage](loss.png)\n")
    text += [table for table in map(_calibration_table, runs) if table]
    text += [
        f"## Metrics of {run.name} that could not be read\n\n"
        + "".join(f"- {fault}\n" for fault in run.skipped)
        for run in runs
        if run.skipped
    ]
    for run in runs:
        if lines := skipped_updates(run):
            text.append(f"## Skipped updates of {run.name}\n\n" + "\n".join(lines) + "\n")
    text += [f"## Data of {run.name}\n\n{_data_table(run)}" for run in runs if run.data]
    path = folder / "report.md"
    write_text(path, "\n".join(text))
    return path
