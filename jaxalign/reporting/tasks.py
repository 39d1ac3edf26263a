"""Scores on tasks of the lm-evaluation-harness: before and after, with 95 % intervals.

A report of tasks is a mapping with "scores": a list of mappings with "task", "metric", "filter",
"documents", "few_shot", "chat", "higher_is_better", "model" and "after"; where there is a model
from before, also "reference", "before" and "change". "after", "before" and "change" have a "value"
and a "half_width", which is null where no interval is known.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError
from jaxalign.files import read_json

FILE = "tasks.json"
"""In a run folder: the report of its tasks."""

Named = tuple[str, Mapping[str, Any]]
"""Name of a run, and its report of tasks."""


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report of a run's tasks; None: it was not evaluated on any.

    Args:
      folder: of the run.

    Raises:
      UserError: the file is broken.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    report = read_json(path, "scores of a run's tasks")
    scores = report.get("scores")
    if not isinstance(scores, list) or not all(_whole(one) for one in scores):
        raise UserError(f"{path}: not the scores of a run's tasks; remove it and evaluate again")
    return report


def _whole(score: Any) -> bool:
    """Whether a score has what a table shows."""
    if not isinstance(score, Mapping) or not {"task", "metric", "filter", "after"} <= set(score):
        return False
    ends = [score.get(name) for name in ("before", "after", "change")]
    return all(end is None or (isinstance(end, Mapping) and "value" in end) for end in ends)


def table(reports: Sequence[Named]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line per task, metric and run, with the number n of documents.

    Args:
      reports: by run; an empty name has no column.
    """
    scores = [(name, score) for name, report in reports for score in report["scores"]]
    named = any(name for name, _ in scores)
    compared = any(score.get("before") for _, score in scores)
    header = [*(["run"] if named else []), "task", "metric", "n"]
    header += ["before", "after", "change"] if compared else ["score"]
    rows = []
    for name, score in scores:
        ends = ("before", "after", "change") if compared else ("after",)
        arrow = {True: " ↑", False: " ↓"}.get(score.get("higher_is_better"), "")
        kind = "" if score["filter"] == "none" else f" ({score['filter']})"
        rows.append(
            [
                *([name] if named else []),
                score["task"],
                f"{score['metric']}{kind}{arrow}",
                f"{score['documents']:,}" if score.get("documents") else "",
                *(_cell(score.get(end), signed=end == "change") for end in ends),
            ]
        )
    return header, rows


def _cell(end: Mapping[str, Any] | None, *, signed: bool) -> str:
    """A value with its interval."""
    if end is None:
        return ""
    value, half = end["value"], end.get("half_width")
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text if half is None else f"{text} ± {half:.3f}"


def notes(reports: Sequence[Named]) -> list[str]:
    """Lines on the models, and on what became worse by more than its interval.

    Args:
      reports: by run.
    """
    lines = []
    for name, report in reports:
        head = f"{name}: " if name else ""
        origins: dict[str, list[str]] = {}
        for score in report["scores"]:
            tasks = origins.setdefault(_origin(score), [])
            tasks += [score["task"]] if score["task"] not in tasks else []
        for origin, tasks in origins.items():
            names = f" ({', '.join(tasks)})" if len(origins) > 1 else ""
            lines.append(f"{head}{origin}{names}")
        lines += [
            f"{head}worse than before: {text}" for text in map(_loss, report["scores"]) if text
        ]
    return lines


def outdated(report: Mapping[str, Any], last: Mapping[str, Any]) -> list[str]:
    """The tasks that a run was evaluated on before its last step.

    Args:
      report: of the run.
      last: the last line of its metrics.
    """
    at = {"stage": last["stage"], "step": last["step"]}
    old = (score["task"] for score in report["scores"] if score.get("at", at) != at)
    return list(dict.fromkeys(old))


def _origin(score: Mapping[str, Any]) -> str:
    """The models of a score and how they read texts."""
    models = str(score.get("model", ""))
    if score.get("reference"):
        models = f"before {score['reference']}, after {models}"
    parts = [models, "with the chat template" if score.get("chat") else "plain text"]
    if (examples := score.get("few_shot")) is not None:
        parts.append(f"{examples} example{'s' * (examples != 1)}")
    return ", ".join(parts)


def _loss(score: Mapping[str, Any]) -> str:
    """A score that became worse by more than its interval; empty: it did not."""
    change, better = score.get("change"), score.get("higher_is_better")
    if change is None or change.get("half_width") is None or not isinstance(better, bool):
        return ""
    gain = change["value"] if better else -change["value"]
    if gain >= -change["half_width"]:
        return ""
    return f"{score['task']}, {score['metric']}: {_cell(change, signed=True)}"
