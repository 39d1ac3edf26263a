"""Every pair of policies compared on the same prompts, and what the verdicts say of policies."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxalign.evaluation.annotators import Annotator, Verdicts
from jaxalign.evaluation.bradley_terry import (
    Cycles,
    Pairings,
    Ratings,
    cycles,
    over_seeds,
    ratings,
)
from jaxalign.evaluation.judging import JudgingOptions
from jaxalign.evaluation.outputs import Matched
from jaxalign.evaluation.win_rates import (
    LengthControlled,
    WinRate,
    instruction_difficulty,
    length_controlled,
    length_feature,
    win_rate,
)
from jaxalign.files import json_value, write_json_lines

MODELS_FOR_DIFFICULTY = 3
"""Fewer policies than these beside the baseline say little about the difficulty of a prompt."""
FITTED = 5
"""A fit is resampled this many times less often than a mean."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A response of one policy beside that of another, and the verdict on them."""

    item: int
    """Index of the prompt."""
    names: tuple[str, str]
    seeds: tuple[int, int]
    responses: tuple[str, str]
    preference: float
    by_order: tuple[float, float] | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class PolicyPair:
    """Two policies."""

    names: tuple[str, str]
    win_rate: WinRate
    length_controlled: LengthControlled
    seeds: Pairings


@dataclass(frozen=True, kw_only=True)
class Standings:
    """Three or more policies."""

    ratings: Ratings
    cycles: Cycles
    baseline: str
    over_baseline: Mapping[str, LengthControlled]
    """Win rates of the other policies over the baseline, at equal length."""


def compare(annotator: Annotator, matched: Matched) -> tuple[list[Comparison], Verdicts]:
    """Judge every pair of policies, with every pairing of their seeds, on every prompt."""
    asked = list(_asked(matched))
    columns = [(matched.prompts[item], *texts) for item, _, _, texts in asked]
    verdicts = annotator.preferences(*map(list, zip(*columns, strict=True)))
    orders = None if verdicts.by_order is None else verdicts.by_order.tolist()
    comparisons = [
        Comparison(
            item=item,
            names=names,
            seeds=seeds,
            responses=texts,
            preference=float(verdicts.preference[number]),
            by_order=None if orders is None else (orders[number][0], orders[number][1]),
            reason=verdicts.reasons[number],
        )
        for number, (item, names, seeds, texts) in enumerate(asked)
    ]
    return comparisons, verdicts


def _asked(
    matched: Matched,
) -> Iterator[tuple[int, tuple[str, str], tuple[int, int], tuple[str, str]]]:
    """Prompt, policies, seeds and responses of every comparison."""
    for one, other in combinations(matched.responses, 2):
        ours, theirs = matched.responses[one], matched.responses[other]
        for seeds in product(range(len(ours)), range(len(theirs))):
            for item in range(len(matched.prompts)):
                texts = ours[seeds[0]][item], theirs[seeds[1]][item]
                yield item, (one, other), seeds, texts


def write_verdicts(comparisons: Sequence[Comparison], matched: Matched, path: Path) -> None:
    """Write the comparisons as JSON Lines."""
    rows = []
    for one in comparisons:
        row = {"prompt": matched.prompts[one.item], "place": matched.places[one.item]}
        row |= {name: x for name, x in vars(one).items() if name not in ("item", "responses")}
        rows.append(json_value(row))
    write_json_lines(path, rows)


def pair_of(
    names: tuple[str, str], comparisons: Sequence[Comparison], options: JudgingOptions
) -> PolicyPair:
    """Win rates of a policy over another.

    Args:
      names: of the two.
      comparisons: of all policies.
      options: confidence, resamples and seed of the intervals.
    """
    own = [one for one in comparisons if one.names == names]
    preference = np.array([one.preference for one in own])
    lengths = np.array([[len(text) for text in one.responses] for one in own])
    known = [one for one in own if math.isfinite(one.preference)]
    rates = [
        float(np.mean([one.preference for one in known if one.seeds == seeds]))
        for seeds in dict.fromkeys(one.seeds for one in known)
    ]
    groups = [one.item for one in own]
    return PolicyPair(
        names=names,
        win_rate=win_rate(
            preference,
            groups=groups,
            confidence=options.confidence,
            resamples=options.resamples,
            seed=options.seed,
        ),
        length_controlled=length_controlled(
            preference,
            lengths[:, 0],
            lengths[:, 1],
            groups=groups,
            confidence=options.confidence,
            resamples=max(1, options.resamples // FITTED),
            seed=options.seed,
        ),
        seeds=over_seeds(rates),
    )


def standings(
    matched: Matched, comparisons: Sequence[Comparison], options: JudgingOptions
) -> Standings:
    """Ratings, cycles, and win rates over the baseline at equal length."""
    names = list(matched.responses)
    games = _games(names, len(matched.prompts), comparisons)
    baseline = options.baseline or names[-1]
    return Standings(
        ratings=ratings(
            games,
            confidence=options.confidence,
            resamples=options.resamples,
            seed=options.seed,
        ),
        cycles=cycles(games),
        baseline=baseline,
        over_baseline=_over_baseline(baseline, games, matched, options),
    )


def _games(
    names: Sequence[str], prompts: int, comparisons: Sequence[Comparison]
) -> Float[np.ndarray, "prompts policies policies"]:
    """P(i's response is better than j's) for each prompt, the mean over pairings of seeds."""
    total = np.zeros((prompts, len(names), len(names)))
    count = np.zeros_like(total)
    index = {name: number for number, name in enumerate(names)}
    for one in comparisons:
        if math.isfinite(one.preference):
            i, j = index[one.names[0]], index[one.names[1]]
            total[one.item, i, j] += one.preference
            total[one.item, j, i] += 1 - one.preference
            count[one.item, i, j] += 1
            count[one.item, j, i] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _over_baseline(
    baseline: str, games: np.ndarray, matched: Matched, options: JudgingOptions
) -> dict[str, LengthControlled]:
    """Win rates over the baseline at equal length, with difficulties if the policies suffice."""
    names = list(matched.responses)
    lengths = {
        name: np.mean([[len(x) for x in responses] for responses in seeds], axis=0)
        for name, seeds in matched.responses.items()
    }
    column = names.index(baseline)
    others = [number for number, name in enumerate(names) if name != baseline]
    preference = games[:, others, column].T
    features = [length_feature(lengths[names[x]], lengths[baseline]) for x in others]
    difficulty = None
    if len(others) >= MODELS_FOR_DIFFICULTY:
        difficulty = instruction_difficulty(preference, np.stack(features))
    return {
        names[x]: length_controlled(
            row,
            lengths[names[x]],
            lengths[baseline],
            difficulty=difficulty,
            confidence=options.confidence,
            resamples=max(1, options.resamples // FITTED),
            seed=options.seed,
        )
        for x, row in zip(others, preference, strict=True)
    }
