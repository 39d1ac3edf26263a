"""The content of a run folder: its config, its metrics and the counts of its data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError
from jaxalign.files import read_json
from jaxalign.training.checkpoints import DIGESTS, damage
from jaxalign.training.metrics import parse_metrics

STAGES = ("pretrain", "sft", "preference", "feedback", "online", "representation")
"""In the order of a run."""
STEPS = "steps.json"
"""In a run folder: the steps of each stage, those of epochs too."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The content of a run folder."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    data: Mapping[str, Mapping[str, Any]]
    """What was read and tokenised, by name: `data.json`."""
    skipped: Sequence[str] = ()
    """Lines of `metrics.jsonl` that cannot be used: number of the line and fault."""

    def curve(self, stage: str, split: str, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric; empty where it was not recorded."""
        points = [
            (line["step"], float(line[metric]))
            for line in self.lines
            if line["stage"] == stage and line["split"] == split and line.get(metric) is not None
        ]
        return [step for step, _ in points], [value for _, value in points]

    def has_stage(self, stage: str) -> bool:
        """Whether the run has reached a stage."""
        return any(line["stage"] == stage for line in self.lines)

    def last(self, stage: str, split: str) -> Mapping[str, Any]:
        """The last line of a stage; empty where there is none."""
        lines = [x for x in self.lines if x["stage"] == stage and x["split"] == split]
        return lines[-1] if lines else {}

    def first_and_last(self, stage: str, metric: str) -> tuple[float, float] | None:
        """The held-out value before the stage's first step and after its last."""
        _, values = self.curve(stage, "eval", metric)
        return (values[0], values[-1]) if values else None

    def cells(self, metric: str, form: str) -> tuple[str, str]:
        """The held-out value before and after, as text; a fraction has its 95 % interval."""
        values = self.first_and_last("preference", metric)
        if values is None:
            return "", ""
        pairs = self.data.get("held_out_pairs", {}).get("records")
        texts = [form.format(value) for value in values]
        if pairs and metric.endswith("accuracies"):
            errors = [half_width(value, pairs) for value in values]
            texts = [f"{text} ± {error:.3f}" for text, error in zip(texts, errors, strict=True)]
        return texts[0], texts[1]


def before_and_after(
    runs: Sequence[Run], stage: str, metrics: Sequence[tuple[str, str, str]], heading: str
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table: a line per metric; before and after, or both in a column per run.

    Args:
      runs: to show.
      stage: whose held-out metrics these are.
      metrics: name, label and format of each.
      heading: of the labels.
    """
    rows = []
    for metric, label, form in metrics:
        ends = [run.first_and_last(stage, metric) for run in runs]
        if any(ends):
            cells = [[form.format(x) for x in both] if both else ["", ""] for both in ends]
            rows.append([label, *(cells[0] if len(runs) == 1 else map(" → ".join, cells))])
    names = ["before", "after"] if len(runs) == 1 else [run.name for run in runs]
    return [heading, *names], rows


def half_width(fraction: float, number: int) -> float:
    r"""Half of the 95 % interval of a fraction of independent cases.

    .. math:: z \sqrt{p (1 - p) / n}, \quad z = 1.96

    At 0 and 1 this is 0; there it is Wilson's bound, :math:`z^2 / (n + z^2)`.

    Args:
      fraction: p.
      number: n.
    """
    if 0 < fraction < 1:
        return 1.96 * math.sqrt(fraction * (1 - fraction) / number)
    return 1.96**2 / (number + 1.96**2)


def read_run(folder: Path | str) -> Run:
    """Read a run folder.

    Raises:
      UserError: it is not a run folder, or its config or the counts of its data are broken.
    """
    folder = Path(folder)
    for name in ("config.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name}; name a folder made by jaxalign train")
    lines, skipped = parse_metrics(folder / "metrics.jsonl")
    config = read_json(folder / "config.json", "config of a run")
    if not isinstance(config.get("name"), str):
        raise UserError(f"{folder / 'config.json'}: no name; name a folder made by jaxalign train")
    data = folder / "data.json"
    counts = read_json(data, "counts of a run's data") if data.is_file() else {}
    if not all(isinstance(one, Mapping) for one in counts.values()):
        raise UserError(f"{data}: not the counts of a run's data; remove it to report without them")
    return Run(
        folder=folder,
        name=config["name"],
        config=config,
        lines=lines,
        data=counts,
        skipped=skipped,
    )


def faults(run: Run) -> list[str]:
    """One line for each metric that cannot be read and each damaged checkpoint."""
    lines = [f"{fault}; the line is left out of the report" for fault in run.skipped]
    for kept in sorted((run.folder / "checkpoints").glob(f"*/[0-9]*/{DIGESTS}")):
        if (fault := damage(kept.parent)) is not None:
            lines.append(f"{fault}; the checkpoint is damaged")
    return lines
