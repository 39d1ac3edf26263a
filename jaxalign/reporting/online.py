"""The online stage in a report: held-out win rate and divergence, time of a step, samples."""

import json
from collections.abc import Sequence
from typing import Any

from jaxalign.reporting.charts import Chart, Series, colour
from jaxalign.reporting.page import Example, Examples
from jaxalign.reporting.runs import Run

STAGE = "online"
SAMPLES = "rollouts.jsonl"
ROWS = (
    ("win_rate", "win rate against the reference", "{:z.3f}"),
    ("reward", "reward", "{:z.3f}"),
    ("kl", "KL to reference (nats per response)", "{:z.3f}"),
    ("rollout/length", "tokens per response", "{:z.1f}"),
    ("rollout/finished", "finished with an end token", "{:z.3f}"),
    ("annotation/failed", "without a verdict", "{:z.3f}"),
)
"""Held-out metric, its name in a table and its format."""
SHARES = ("time/sampling", "time/annotation", "time/update")


def has_stage(run: Run) -> bool:
    """Whether a run has reached its online stage."""
    return run.has_stage(STAGE)


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


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Held-out win rate over steps and over divergence, and where the time of a step went."""
    wins, costs = [], []
    for index, run in enumerate(runs):
        style: Any = {
            "colour": colour(index),
            "label": run.name if len(runs) > 1 else "",
            "dots": True,
        }
        steps, rates = run.curve(STAGE, "eval", "win_rate")
        divergences = dict(zip(*run.curve(STAGE, "eval", "kl"), strict=True))
        both = [
            (divergences[step], rate)
            for step, rate in zip(steps, rates, strict=True)
            if step in divergences
        ]
        wins.append(Series(x=steps, y=rates, **style))
        costs.append(Series(x=[x for x, _ in both], y=[y for _, y in both], **style))
    bars, base = [], [0.0] * len(runs)
    for index, share in enumerate(SHARES):
        means = [_mean(run.curve(STAGE, "train", share)[1]) for run in runs]
        bars.append(
            Series(
                kind="bars",
                colour=colour(index),
                label=share.split("/")[1],
                x=range(len(runs)),
                y=means,
                base=base,
            )
        )
        base = [below + mean for below, mean in zip(base, means, strict=True)]
    return [
        Chart(
            title="Win rate against the reference",
            series=wins,
            y_label="held-out prompts",
            rule=0.5,
        ),
        Chart(
            title="Win rate and divergence",
            series=costs,
            x_label="KL to reference, nats per response",
            y_label="win rate",
            rule=0.5,
        ),
        Chart(
            title="Fraction of the time of a step",
            series=bars,
            x_label="",
            y_range=(0, 1),
            x_names=[run.name for run in runs],
        ),
    ]


def _mean(values: Sequence[float]) -> float:
    later = values[1:] or values  # the first step compiles
    return sum(later) / len(later) if later else 0.0


def samples(run: Run, *, number: int = 4) -> Examples | None:
    """The last responses that a run kept; None where it kept none."""
    path = run.folder / SAMPLES
    if not path.is_file() or not number:
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    examples = []
    for line in filter(None, map(_sample, lines[-number:])):
        rewards = ", ".join("none" if x is None else f"{x:.3g}" for x in line.get("reward", []))
        verdict = f"rewards {rewards}" if rewards else _verdict(line.get("preference", []))
        examples.append(
            Example(
                facts=f"step {line['step']}; {verdict}",
                prompt=line["prompt"],
                names=[str(at + 1) for at in range(len(line["responses"]))],
                responses=line["responses"],
                better=None,
            )
        )
    return Examples(title=f"Samples of {run.name}", note="", examples=examples)


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
