"""Policies side by side: every pair of them judged, as numbers, remarks and parts of a page."""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.evaluation.annotators import Annotator
from jaxalign.evaluation.comparisons import (
    PolicyPair,
    Standings,
    compare,
    pair_of,
    standings,
    write_verdicts,
)
from jaxalign.evaluation.examples import examples
from jaxalign.evaluation.judging import Findings, JudgingOptions, Part, order_and_failures
from jaxalign.evaluation.judging_tables import pair_table, standings_parts
from jaxalign.evaluation.outputs import Matched
from jaxalign.evaluation.win_rates import moved_far


def facts_of(matched: Matched, files: Mapping[str, Sequence[str]]) -> list[str]:
    """What was read, a line for each policy."""
    lines = []
    for (name, sources), seeds in zip(files.items(), matched.responses.values(), strict=True):
        length = np.mean([len(text) for responses in seeds for text in responses])
        lines.append(f"{name}: {', '.join(sources)}; {length:,.0f} characters a response")
    lines.append(f"{len(matched.prompts):,} prompts")
    if matched.left_out:
        lines[-1] += f"; {matched.left_out:,} that some file lacks are left out"
    return lines


def side_by_side(
    annotator: Annotator, matched: Matched, options: JudgingOptions, folder: Path
) -> Findings:
    """Judge every pair of policies.

    Args:
      annotator: the judge.
      matched: prompts and the policies' responses.
      options: of the summary.
      folder: gets each verdict, in verdicts.jsonl.
    """
    comparisons, verdicts = compare(annotator, matched)
    judging, notes = order_and_failures(verdicts)
    write_verdicts(comparisons, matched, folder / "verdicts.jsonl")
    pairs = [pair_of(two, comparisons, options) for two in combinations(matched.responses, 2)]
    results: dict[str, Any] = {
        "prompts": len(matched.prompts),
        "judging": judging,
        "pairs": [dataclasses.asdict(pair) for pair in pairs],
    }
    notes += _notes_on_length(pairs)
    parts: list[Part] = []
    if len(matched.responses) > 2:
        table = standings(matched, comparisons, options)
        results |= _standings_results(list(matched.responses), table)
        notes += _notes_on_standings(table)
        parts += standings_parts(table, pairs, matched, options)
    parts += [pair_table(pairs, options), *examples(comparisons, matched, options.examples)]
    return Findings(results=results, notes=notes, parts=parts)


def _notes_on_length(pairs: Sequence[PolicyPair]) -> list[str]:
    far = [
        " over ".join(pair.names)
        for pair in pairs
        if moved_far(pair.win_rate.rate, pair.length_controlled.rate)
    ]
    if not far:
        return []
    return [
        f"equal lengths move {len(far)} of {len(pairs)} win rates far ({far[0]}"
        f"{', ...' if len(far) > 1 else ''}): the judge may reward length before all else"
    ]


def _standings_results(names: Sequence[str], table: Standings) -> dict[str, Any]:
    rated = table.ratings
    return {
        "elo": {
            name: {"elo": rated.elo[at], "interval": [rated.low[at], rated.high[at]]}
            for at, name in enumerate(names)
        },
        "cycles": dataclasses.asdict(table.cycles) | {"rate": table.cycles.rate},
        "baseline": table.baseline,
        "over_baseline": {name: dataclasses.asdict(x) for name, x in table.over_baseline.items()},
    }


def _notes_on_standings(table: Standings) -> list[str]:
    notes = []
    if not table.ratings.finite:
        notes.append(
            "a policy won or lost everything against others: its rating is not finite, and is "
            "held back by a prior of 521 points"
        )
    if table.cycles.triples:
        notes.append(
            f"cycles (a over b over c over a): {table.cycles.rate:.1%} of "
            f"{table.cycles.triples:,} triples of responses without ties; by chance it is 25%"
        )
    return notes
