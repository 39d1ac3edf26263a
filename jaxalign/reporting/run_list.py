"""The runs below a folder: how far each is, and how well it does."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from jaxalign.errors import UserError
from jaxalign.files import is_locked, read_json
from jaxalign.reporting.runs import STAGES, STEPS
from jaxalign.training.metrics import parse_metrics

DEPTH = 4
"""Levels of folders in which runs are looked for: the name of a run may have slashes."""
State = Literal[
    "finished", "running", "stopped", "failed before its first step", "broken", "not a run"
]


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run in one line, or why a folder is not a run."""

    name: str
    """Path below the listed folder."""
    state: State
    stage: str = ""
    step: int = 0
    steps: int | None = None
    """Steps of the stage; None where the run has not recorded enough to know."""
    loss: float | None = None
    """Of the last training step."""
    accuracy: float | None = None
    """Of the last held-out evaluation of the stage, as the margin."""
    margin: float | None = None
    written: str = ""
    """Time of the last change to its metrics, as ISO 8601; local time."""
    fault: str = ""
    """What is wrong with its files."""


def list_runs(folder: Path) -> list[RunSummary]:
    """The runs below a folder, or the folder itself if it is a run; the newest first.

    Raises:
      UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one that holds runs")
    if _holds_run(folder):
        return [_summary(folder, ".")]
    found = _candidates(folder, DEPTH)
    summaries = [_summary(one, str(one.relative_to(folder))) for one in found]
    return sorted(summaries, key=lambda one: one.written, reverse=True)


def table(runs: Sequence[RunSummary]) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    rows = [
        [
            one.name,
            one.stage,
            f"{one.step:,} of {'?' if one.steps is None else f'{one.steps:,}'}",
            number(one.loss, "{:.4f}"),
            number(one.accuracy, "{:.3f}"),
            number(one.margin, "{:z.3f}"),
            one.state,
            one.written.replace("T", " ")[:16],
        ]
        for one in runs
    ]
    header = ["run", "stage", "step", "loss", "accuracy", "margin", "state", "written"]
    return header, rows


def _holds_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "metrics.jsonl"))


def _candidates(folder: Path, depth: int) -> Iterator[Path]:
    """Folders that may be runs, and folders without any run in them."""
    try:
        inside = sorted(
            one for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".")
        )
    except OSError:
        return
    for one in inside:
        is_end = _holds_run(one) or one.is_symlink() or depth == 1
        deeper = [] if is_end else list(_candidates(one, depth - 1))
        yield from deeper if any(map(_holds_run, deeper)) else [one]


def _summary(folder: Path, name: str) -> RunSummary:
    if not _holds_run(folder):
        return RunSummary(name=name, state="not a run", fault="no config.json")
    metrics = folder / "metrics.jsonl"
    try:
        written = (metrics if metrics.exists() else folder / "config.json").stat().st_mtime
        config = read_json(folder / "config.json", "config of a run")
        lines, faults = parse_metrics(metrics) if metrics.exists() else ([], [])
        counted = read_json(folder / STEPS, "steps of a run") if (folder / STEPS).exists() else {}
    except UserError as error:
        return RunSummary(name=name, state="broken", fault=str(error))
    except OSError as error:
        fault = f"{error.filename}: cannot be read: {error.strerror}"
        return RunSummary(name=name, state="broken", fault=fault)
    planned = [stage for stage in STAGES if _planned(config.get(stage))]
    if not planned and not lines:
        return RunSummary(name=name, state="not a run", fault="its config.json names no stage")
    stage = lines[-1]["stage"] if lines else planned[0]
    of_stage = [line for line in lines if line["stage"] == stage]
    step = max((line["step"] for line in of_stage), default=0)
    steps = _steps(config.get(stage), counted.get(stage))
    return RunSummary(
        name=name,
        state=_state(
            folder,
            begun=any(line["step"] > 0 for line in lines) or bool(faults),
            complete=stage in planned[-1:] and step >= (steps or 0),
        ),
        stage=stage,
        step=step,
        steps=steps,
        loss=_last(of_stage, "train", "loss"),
        accuracy=_last(of_stage, "eval", "rewards/accuracies"),
        margin=_last(of_stage, "eval", "rewards/margins"),
        written=datetime.fromtimestamp(written).isoformat(timespec="seconds"),
        fault=f"{len(faults):,} lines that cannot be read, first {faults[0]}" if faults else "",
    )


def _state(folder: Path, *, begun: bool, complete: bool) -> State:
    """The state of a run.

    Args:
      folder: of the run.
      begun: whether it has made a step.
      complete: whether its last stage has made all its steps, as far as is known.
    """
    if is_locked(folder, folder=True):
        return "running"
    if not begun and not any((folder / "checkpoints").glob("*/[0-9]*")):
        return "failed before its first step"
    # the report is what a run writes last
    return "finished" if complete and (folder / "report" / "report.md").is_file() else "stopped"


def _planned(stage: Any) -> bool:
    return isinstance(stage, Mapping) and any(
        isinstance(stage.get(name), int | float) and stage[name] > 0 for name in ("steps", "epochs")
    )


def _steps(stage: Any, counted: Any) -> int | None:
    """The steps of a stage; None: it has none, or its epochs are not counted in steps yet."""
    if not _planned(stage):
        return None
    steps = stage.get("steps") or counted
    return int(steps) if isinstance(steps, int | float) else None


def _last(lines: Sequence[Mapping[str, Any]], split: str, metric: str) -> float | None:
    """The last finite value of a metric."""
    for line in reversed(lines):
        value = line.get(metric) if line["split"] == split else None
        if value is not None:
            return float(value) if math.isfinite(value) else None
    return None
