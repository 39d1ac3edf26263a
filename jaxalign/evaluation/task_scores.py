"""Scores on tasks of the lm-evaluation-harness with their intervals, and how they changed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

Z = 1.96
"""Standard errors in half of a 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A metric of a task or of a group of tasks."""

    task: str
    metric: str
    filter: str
    """What the harness took from a response before scoring it; "none": all of it."""
    value: float
    half_width: float | None
    """Half of the 95 % interval; None: unknown."""
    documents: int | None
    few_shot: int | None
    """Number of examples before a question."""
    higher_is_better: bool | None
    by_document: tuple[float, ...] = ()
    """What the value is the mean of; empty: it is no mean, or that of a group."""


def scores_of(results: Mapping[str, Any]) -> list[TaskScore]:
    """The scores in what `lm_eval.simple_evaluate` returns.

    The interval is 1.96 of the harness's standard errors to either side. Where all documents have
    the same value of -1, 0 or 1, the standard error is 0; there it is Wilson's bound.

    Args:
      results: with the values of the documents ("samples").
    """
    found = []
    for task, metrics in results["results"].items():
        samples = results.get("samples", {}).get(task, ())
        counts = results.get("n-samples", {}).get(task, {})
        for key, value in metrics.items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _number(value):
                continue
            own = [x[metric] for x in samples if x.get("filter") == kept and metric in x]
            means = bool(own) and all(map(_number, own))
            means = means and math.isclose(float(np.mean(own)), value, rel_tol=1e-9, abs_tol=1e-12)
            error = metrics.get(f"{metric}_stderr,{kept}")
            half = Z * float(error) if _number(error) else None
            found.append(
                TaskScore(
                    task=task,
                    metric=metric,
                    filter=kept,
                    value=float(value),
                    half_width=(_without_spread(own) or half) if means else half,
                    documents=len(own) or counts.get("effective") or metrics.get("sample_len"),
                    few_shot=results.get("n-shot", {}).get(task),
                    higher_is_better=results.get("higher_is_better", {}).get(task, {}).get(metric),
                    by_document=tuple(map(float, own)) if means else (),
                )
            )
    return found


def change(before: TaskScore, after: TaskScore) -> dict[str, float | None]:
    r"""How a score changed, with half of the 95 % interval of the change.

    .. math:: \bar d \pm 1.96 \, s_d / \sqrt n, \quad d_i = y_i - x_i

    The documents are the same, so that what is hard for both models does not count as noise.

    Args:
      before: of one model.
      after: of the other, on the same documents.

    Returns:
      "value" and "half_width"; None is unknown, as for a score that is not a mean over documents.
    """
    pairs = before.by_document, after.by_document
    half = None
    if len(pairs[0]) == len(pairs[1]) > 1:
        differences = np.subtract(pairs[1], pairs[0])
        spread = float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
        half = _without_spread(differences) or Z * spread
    return {"value": after.value - before.value, "half_width": half}


def compared(
    after: Sequence[TaskScore], before: Sequence[TaskScore] | None
) -> list[dict[str, Any]]:
    """The scores as a report has them (`jaxalign.reporting.tasks`).

    Args:
      after: of the model.
      before: of the model to compare it with, on the same tasks; None: there is none.
    """
    earlier = {_key(score): score for score in before or ()}
    rows = []
    for score in after:
        row: dict[str, Any] = {
            "task": score.task,
            "metric": score.metric,
            "filter": score.filter,
            "documents": score.documents,
            "few_shot": score.few_shot,
            "higher_is_better": score.higher_is_better,
            "after": {"value": score.value, "half_width": score.half_width},
        }
        if (other := earlier.get(_key(score))) is not None:
            row["before"] = {"value": other.value, "half_width": other.half_width}
            row["change"] = change(other, score)
        rows.append(row)
    return rows


def _key(score: TaskScore) -> tuple[str, str, str]:
    return score.task, score.metric, score.filter


def _number(value: object) -> bool:
    return isinstance(value, Real | np.number | np.bool_) and math.isfinite(float(value))


def _without_spread(values: Iterable[float]) -> float:
    """Wilson's bound, z^2 / (n + z^2), for equal values of -1, 0 or 1; 0 for all others."""
    known = list(map(float, values))
    if len(set(known)) > 1 or known[0] not in (-1.0, 0.0, 1.0):
        return 0.0
    return Z**2 / (len(known) + Z**2)
