"""Comparisons to read: those that a page of judging shows."""

import math
from collections.abc import Sequence

import numpy as np

from jaxalign.evaluation.annotators import Verdicts
from jaxalign.evaluation.comparisons import Comparison
from jaxalign.evaluation.outputs import Labelled, Matched
from jaxalign.reporting.judging_page import Example, Examples


def examples(comparisons: Sequence[Comparison], matched: Matched, limit: int) -> list[Examples]:
    """The clearest wins of either side, what the order decides, what has no verdict.

    Args:
      comparisons: of policies.
      matched: their prompts.
      limit: largest number of examples of each kind.
    """
    known = [x for x in comparisons if math.isfinite(x.preference)]
    two = len(matched.responses) == 2
    names = list(matched.responses)
    wins = sorted((x for x in known if x.preference > 0.5), key=lambda x: -x.preference)
    losses = sorted((x for x in known if x.preference < 0.5), key=lambda x: x.preference)
    torn = sorted((x for x in known if _torn(x.by_order)), key=lambda x: -_gap(x.by_order))
    failed = [x for x in comparisons if x.reason]
    groups = [
        (f"{names[0]} wins" if two else "Clear wins of the first-named", wins, WINS),
        (f"{names[1]} wins" if two else "Clear wins of the second-named", losses, WINS),
        ("The order decides", torn, "Each order of the two has another winner."),
        ("Without a verdict", failed, "Left out of all figures above."),
    ]
    return [
        Examples(
            title=title,
            note=f"{note} {len(group):,} in all.",
            examples=[_example(x, matched) for x in _of_different_prompts(group, limit)],
        )
        for title, group, note in groups
    ]


WINS = "The judge's surest first; among equals, in the order of the files."


def _of_different_prompts(comparisons: Sequence[Comparison], limit: int) -> list[Comparison]:
    """The first ones, one for each prompt."""
    first: dict[int, Comparison] = {}
    for x in comparisons:
        if len(first) < limit:
            first.setdefault(x.item, x)
    return list(first.values())


def _torn(by_order: Sequence[float] | None) -> bool:
    return by_order is not None and (by_order[0] - 0.5) * (by_order[1] - 0.5) < 0


def _gap(by_order: Sequence[float] | None) -> float:
    return 0.0 if by_order is None else abs(by_order[0] - by_order[1])


def _words(preference: float, by_order: Sequence[float] | None, reason: str) -> str:
    if reason:
        return f"no verdict: {reason}"
    words = f"P(left is better) {preference:.3f}"
    if by_order is not None and np.isfinite(by_order).all():
        words += f"; shown first {by_order[0]:.3f}, shown second {by_order[1]:.3f}"
    return words


def _better(preference: float) -> int | None:
    return None if preference == 0.5 or math.isnan(preference) else int(preference < 0.5)


def _example(x: Comparison, matched: Matched) -> Example:
    seeds = [
        "" if len(matched.responses[name]) == 1 else f" ({seed})"
        for name, seed in zip(x.names, x.seeds, strict=True)
    ]
    return Example(
        facts=f"{matched.places[x.item]}; {_words(x.preference, x.by_order, x.reason)}",
        prompt=matched.prompts[x.item],
        names=(x.names[0] + seeds[0], x.names[1] + seeds[1]),
        responses=x.responses,
        better=_better(x.preference),
    )


def against_people(labelled: Sequence[Labelled], verdicts: Verdicts, limit: int) -> list[Examples]:
    """Where the judge is surest against people's verdict.

    Args:
      labelled: the comparisons.
      verdicts: the judge's.
      limit: largest number of examples.
    """
    label = np.array([x.label for x in labelled])
    against = (verdicts.preference - 0.5) * (label - 0.5)  # NaN compares false
    wrong = [int(at) for at in np.argsort(against, kind="stable") if against[at] < 0]
    shown = []
    for at in wrong[:limit]:
        row = labelled[at]
        by_order = None if verdicts.by_order is None else verdicts.by_order[at].tolist()
        chosen = 0 if row.label > 0.5 else 1
        sides = (
            ("people's choice", "the other") if chosen == 0 else ("the other", "people's choice")
        )
        shown.append(
            Example(
                facts=f"{row.place}; {_words(float(verdicts.preference[at]), by_order, '')}",
                prompt=row.prompt,
                names=(sides[0], sides[1]),
                responses=(row.first, row.second),
                better=_better(float(verdicts.preference[at])),
            )
        )
    note = f"{len(wrong):,} in all; the mark is the judge's choice."
    return [Examples(title="Against people", note=note, examples=shown)]
