"""What a judging finds, and the folder that it is written to."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from jaxalign.config import AtLeastOne, Count, Range, Seed
from jaxalign.errors import UserError
from jaxalign.evaluation.annotators import Annotator, Verdicts
from jaxalign.evaluation.verdicts import JudgeAnnotator
from jaxalign.files import json_value, write_text
from jaxalign.reporting.judging_page import Examples, Intervals, Table, write_page

Part = Table | Intervals | Examples
"""A part of the page."""


@dataclass(frozen=True, kw_only=True)
class JudgingOptions:
    """How verdicts are summarised and shown."""

    baseline: str | None = None
    """Policy against which length-controlled win rates are computed; None: the last."""
    examples: Count = 5
    """Number of examples of each kind on the page."""
    confidence: Annotated[float, Range("(0, 1)")] = 0.95
    """Confidence level of the intervals."""
    resamples: AtLeastOne = 1000
    """Number of bootstrap resamples."""
    seed: Seed = 0
    """Seed of the bootstrap."""

    @property
    def interval_heading(self) -> str:
        """The heading of a column of intervals."""
        return f"{self.confidence:.0%} interval"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a judging finds: numbers, remarks, and parts of the page."""

    results: Mapping[str, Any] = field(default_factory=dict)
    """Entries of results.json."""
    notes: Sequence[str] = ()
    parts: Sequence[Part] = ()


def joined(findings: Sequence[Findings]) -> Findings:
    """Several findings as one."""
    return Findings(
        results={key: value for one in findings for key, value in one.results.items()},
        notes=[note for one in findings for note in one.notes],
        parts=[part for one in findings for part in one.parts],
    )


def order_and_failures(verdicts: Verdicts) -> tuple[dict[str, Any], list[str]]:
    """How consistent verdicts are over both orders, and how many are missing.

    Returns:
      Numbers for results.json, and lines.

    Raises:
      UserError: there is no verdict at all.
    """
    lines = []
    if verdicts.order_consistency is not None:
        lines.append(
            f"the same winner in both orders: {verdicts.order_consistency:.1%}; the response "
            f"shown first gets {verdicts.first_position_rate:.1%}"
        )
    if failures := verdicts.failures:
        reasons = "; ".join(f"{number:,}: {why}" for why, number in failures.most_common(3))
        lines.append(
            f"{failures.total():,} of {len(verdicts.preference):,} comparisons without a verdict "
            f"({reasons})"
        )
        if failures.total() == len(verdicts.preference):
            raise UserError(f"no verdict at all ({reasons})")
    numbers = {
        "order_consistency": verdicts.order_consistency,
        "first_position_rate": verdicts.first_position_rate,
        "failures": dict(failures),
    }
    return numbers, lines


def judge_name(annotator: Annotator, spec: str) -> str:
    """The name of a judge with what its answers depend on."""
    judge = annotator.judge if isinstance(annotator, JudgeAnnotator) else annotator
    identity = getattr(judge, "identity", None)
    return spec if identity is None else f"{spec} ({identity})"


def usage_of(annotator: Annotator) -> tuple[dict[str, Any], list[str]]:
    """Requests and tokens of a judge behind an endpoint, for results.json and as a line."""
    usage = getattr(getattr(annotator, "judge", None), "usage", None)
    if usage is None:
        return {}, []
    line = (
        f"new requests: {usage.requests:,}, {usage.prompt_tokens:,} + "
        f"{usage.completion_tokens:,} tokens"
    )
    return {"usage": vars(usage)}, [line]


def write_findings(folder: Path, heading: str, facts: Sequence[str], findings: Findings) -> Path:
    """Write index.html and results.json.

    Args:
      folder: to write to.
      heading: of the page.
      facts: lines under it.
      findings: what to show.

    Returns:
      The path of the page.
    """
    page = folder / "index.html"
    write_page(heading, facts, findings.parts, page)
    results = json_value({**findings.results, "notes": findings.notes})
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(folder / "results.json", text + "\n")
    return page
