"""The online stage in a report: held-out win rate and divergence, where the time went, samples."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxalign.reporting.figures import save_figure
from jaxalign.reporting.runs import Run

STAGE = "online"
SAMPLES = "rollouts.jsonl"
ROWS = (
    ("win_rate", "win rate against the reference", "{:z.3f}"),
    ("reward", "reward", "{:z.3f}"),
    ("kl", "KL to reference (nats a response)", "{:z.3f}"),
    ("rollout/length", "tokens of a response", "{:z.1f}"),
    ("rollout/finished", "ended by itself", "{:z.3f}"),
    ("annotation/failed", "without a verdict", "{:z.3f}"),
)
"""Held-out metric -> how a table calls and prints it."""
SHARES = ("time/sampling", "time/annotation", "time/update")


def has_stage(run: Run) -> bool:
    """Whether a run got to its online stage."""
    return any(line["stage"] == STAGE for line in run.lines)


def table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line per metric; before and after, or both in a column per run."""
    shown = [row for row in ROWS if any(run.first_and_last(STAGE, row[0]) for run in runs)]
    rows = []
    for metric, label, form in shown:
        ends = [run.first_and_last(STAGE, metric) for run in runs]
        cells = [[form.format(x) for x in both] if both else ["", ""] for both in ends]
        rows.append([label, *(cells[0] if len(runs) == 1 else map(" → ".join, cells))])
    failed = [run.curve(STAGE, "train", "annotation/failed")[1] for run in runs]
    if any(map(any, failed)):
        cells = [f"{sum(one) / max(len(one), 1):.3f}" for one in failed]
        before = [""] if len(runs) == 1 else []
        rows.append(["training prompts without a verdict", *before, *cells])
    names = ["before", "after"] if len(runs) == 1 else [run.name for run in runs]
    return ["held-out prompts", *names], rows


def plot(runs: Sequence[Run], path: Path) -> None:
    """Held-out win rate and reward over steps, win rate over divergence, and shares of time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for run in runs:
        label = run.name if len(runs) > 1 else None
        steps, wins = run.curve(STAGE, "eval", "win_rate")
        _, divergences = run.curve(STAGE, "eval", "kl")
        line = left.plot(steps, wins, marker=".", label=label)[0]
        middle.plot(divergences, wins, marker=".", color=line.get_color(), label=label)
    left.set(title="Win rate against the reference", xlabel="step", ylabel="held-out prompts")
    middle.set(title="What it cost", xlabel="KL to reference, nats a response", ylabel="win rate")
    for axis in (left, middle):
        axis.axhline(0.5, color="grey", linewidth=0.8)
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        left.legend(fontsize=8)
    bottom = [0.0] * len(runs)
    names = [run.name for run in runs]
    for share in SHARES:
        means = [_mean(run.curve(STAGE, "train", share)[1]) for run in runs]
        right.bar(names, means, bottom=bottom, label=share.split("/")[1])
        bottom = [below + mean for below, mean in zip(bottom, means, strict=True)]
    right.set(title="Share of the time of a step", ylim=(0, 1))
    right.tick_params(axis="x", labelrotation=20 if len(runs) > 2 else 0, labelsize=8)
    right.legend(fontsize=8)
    save_figure(figure, path)
    plt.close(figure)


def _mean(values: Sequence[float]) -> float:
    later = values[1:] or values  # the first step compiles
    return sum(later) / len(later) if later else 0.0


def samples(run: Run, *, number: int = 4) -> str:
    """The last responses that a run kept, as a Markdown table; empty where it kept none."""
    path = run.folder / SAMPLES
    if not path.is_file() or not number:
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    rows = []
    for line in filter(None, map(_sample, lines[-number:])):
        texts = "<br>".join(f"{at}. {_cell(x)}" for at, x in enumerate(line["responses"], 1))
        rewards = ", ".join("none" if x is None else f"{x:.3g}" for x in line.get("reward", []))
        verdict = f"rewards {rewards}" if rewards else _verdict(line.get("preference", []))
        rows.append(f"| {line['step']} | {_cell(line['prompt'])} | {texts} | {verdict} |")
    header = ["| step | prompt | responses | verdict |", "|---:|---|---|---|"]
    return f"## Samples of {run.name}\n\n" + "\n".join(header + rows) + "\n"


def _sample(line: str) -> dict[str, Any] | None:
    """A line of the samples; None where it is damaged."""
    try:
        value = json.loads(line)
        texts = [value["prompt"], *value["responses"]]
    except (ValueError, TypeError, KeyError):
        return None
    return value if "step" in value and all(isinstance(text, str) for text in texts) else None


def _verdict(preference: Sequence[Sequence[float | None]]) -> str:
    first = preference[0][1] if len(preference) > 1 else None  # nobody was asked, or could say
    return "none" if first is None else f"P(1 better than 2) = {first:.2f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").strip()
