"""Policies side by side: the part of `jaxalign judge` that compares what they wrote."""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np

from jaxalign.commands.judged_examples import examples
from jaxalign.commands.judged_words import headings, in_numbers, in_words, plain
from jaxalign.evaluation import (
    Annotator,
    LengthControlled,
    Pairings,
    Ratings,
    WinRate,
    cycles,
    instruction_difficulty,
    length_controlled,
    over_seeds,
    ratings,
    win_rate,
)
from jaxalign.evaluation.outputs import Matched
from jaxalign.evaluation.win_rates import length_feature, moved_far
from jaxalign.files import open_text
from jaxalign.reporting.judging_page import Examples, Intervals, Table

MODELS_FOR_DIFFICULTY = 3  # fewer than these beside the baseline say little about a prompt


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One policy's response beside another's: which prompt, which seeds, what the judge said."""

    item: int
    names: tuple[str, str]
    seeds: tuple[int, int]
    responses: tuple[str, str]
    preference: float
    by_order: tuple[float, float] | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two policies."""

    names: tuple[str, str]
    win_rate: WinRate
    length_controlled: LengthControlled
    seeds: Pairings


def read_lines(matched: Matched, files: Mapping[str, Sequence[str]]) -> list[str]:
    """What was read, a line for each policy."""
    lines = [
        f"{name}: {', '.join(some)}; {np.mean([len(x) for y in of for x in y]):,.0f} characters "
        "a response"
        for (name, some), of in zip(files.items(), matched.responses.values(), strict=True)
    ]
    lines.append(f"{len(matched.prompts):,} prompts")
    if matched.left_out:
        lines[-1] += f"; {matched.left_out:,} that some file lacks are left out"
    return lines


def side_by_side(
    annotator: Annotator, matched: Matched, given: argparse.Namespace, results: dict[str, Any]
) -> list[Table | Intervals | Examples]:
    """Every pair of policies; the folder gets each verdict."""
    asked = list(_asked(matched))
    columns = [(matched.prompts[item], *texts) for item, _, _, texts in asked]
    verdicts = annotator.preferences(*map(list, zip(*columns, strict=True)))
    results |= {"prompts": len(matched.prompts), "judging": in_numbers(verdicts)}
    results.setdefault("notes", []).extend(in_words(verdicts))
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
    with open_text(given.output / "verdicts.jsonl", "w") as file:
        for own in comparisons:
            line = {"prompt": matched.prompts[own.item], "place": matched.places[own.item]}
            line |= {key: x for key, x in vars(own).items() if key not in ("item", "responses")}
            file.write(json.dumps(plain(line), ensure_ascii=False) + "\n")
    names = list(matched.responses)
    pairs = [
        _pair([x for x in comparisons if x.names == two], two, given)
        for two in combinations(names, 2)
    ]
    results["pairs"] = [dataclasses.asdict(pair) for pair in pairs]
    far = [
        " over ".join(pair.names)
        for pair in pairs
        if moved_far(pair.win_rate.rate, pair.length_controlled.rate)
    ]
    if far:
        results["notes"].append(
            f"equal lengths move {len(far)} of {len(pairs)} win rates far ({far[0]}"
            f"{', ...' if len(far) > 1 else ''}): the judge may reward length before all else"
        )
    parts: list[Table | Intervals | Examples] = []
    if len(names) > 2:
        parts += _many(names, matched, comparisons, pairs, given, results)
    return [*parts, _pair_table(pairs, given), *examples(comparisons, matched, given.examples)]


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


def _pair(own: Sequence[Comparison], names: tuple[str, str], given: argparse.Namespace) -> Pair:
    preference = np.array([x.preference for x in own])
    lengths = np.array([[len(text) for text in x.responses] for x in own])
    how: dict[str, Any] = {"confidence": given.confidence, "seed": given.seed}
    how["groups"] = [x.item for x in own]
    rates = [
        np.mean([x.preference for x in own if x.seeds == seeds and math.isfinite(x.preference)])
        for seeds in dict.fromkeys(x.seeds for x in own if math.isfinite(x.preference))
    ]
    return Pair(
        names=names,
        win_rate=win_rate(preference, resamples=given.resamples, **how),
        length_controlled=length_controlled(
            preference, lengths[:, 0], lengths[:, 1], resamples=_fits(given), **how
        ),
        seeds=over_seeds([float(rate) for rate in rates]),
    )


def _fits(given: argparse.Namespace) -> int:
    """Resamples of what is fitted anew for each."""
    return max(1, given.resamples // 5)


def _pair_table(pairs: Sequence[Pair], given: argparse.Namespace) -> Table:
    some_seeds = any(pair.seeds.number > 1 for pair in pairs)
    header = [
        "policies",
        "win rate",
        *headings(given),
        "Wilson's",
        "won/tied/lost",
        "no verdict",
        "equal length",
    ]
    rows = []
    for pair in pairs:
        own, equal = pair.win_rate, pair.length_controlled
        row = [
            " over ".join(pair.names),
            f"{own.rate:.3f}",
            f"{own.bootstrap[0]:.3f} – {own.bootstrap[1]:.3f}",
            f"{own.wilson[0]:.3f} – {own.wilson[1]:.3f}",
            f"{own.wins}/{own.ties}/{own.losses}",
            str(own.failures),
            f"{equal.rate:.3f} ({equal.interval[0]:.3f} – {equal.interval[1]:.3f})",
        ]
        seeds = f"{pair.seeds.mean:.3f} ± {pair.seeds.std:.3f} ({pair.seeds.number})"
        rows.append([*row, seeds] if some_seeds else row)
    return Table(
        title="Win rates",
        header=[*header, "over seeds"] if some_seeds else header,
        rows=rows,
        note="Mean preference for the first policy, ties by halves; the interval is the "
        "bootstrap's over prompts, Wilson's takes every comparison for an independent one. Equal "
        "length: what a logistic model of the length difference predicts for responses equally "
        "long. Comparisons without a verdict are left out of the rest."
        + (" Over seeds: mean and standard deviation of all pairings." if some_seeds else ""),
    )


def _many(
    names: Sequence[str],
    matched: Matched,
    comparisons: Sequence[Comparison],
    pairs: Sequence[Pair],
    given: argparse.Namespace,
    results: dict[str, Any],
) -> list[Table | Intervals | Examples]:
    """Matrix, ratings, cycles, and win rates over the baseline at equal length."""
    games = _games(names, len(matched.prompts), comparisons)
    rated = ratings(games, confidence=given.confidence, resamples=given.resamples, seed=given.seed)
    found = cycles(games)
    baseline = given.baseline or names[-1]
    controlled = _over_baseline(names, baseline, games, matched, given)
    results["elo"] = {
        name: {"elo": rated.elo[at], "interval": [rated.low[at], rated.high[at]]}
        for at, name in enumerate(names)
    }
    results["cycles"] = dataclasses.asdict(found) | {"rate": found.rate}
    results["baseline"] = baseline
    results["over_baseline"] = {name: dataclasses.asdict(x) for name, x in controlled.items()}
    if not rated.finite:
        results["notes"].append(
            "a policy won or lost everything against others: its rating is not finite, and is "
            "held back by a prior of 521 points"
        )
    if found.triples:
        results["notes"].append(
            f"cycles (a over b over c over a): {found.rate:.1%} of {found.triples:,} triples of "
            "responses without ties; by coin it is 25%"
        )
    order = [int(at) for at in np.argsort(-rated.elo, kind="stable")]
    return [
        _ratings_table(names, order, rated, baseline, controlled, matched, given),
        Intervals(
            title=f"Elo, with {given.confidence:.0%} intervals over prompts",
            labels=[names[at] for at in order],
            values=rated.elo[order].tolist(),
            low=rated.low[order].tolist(),
            high=rated.high[order].tolist(),
        ),
        _matrix(names, order, pairs),
    ]


def _games(names: Sequence[str], prompts: int, comparisons: Sequence[Comparison]) -> np.ndarray:
    """P(i's response is better than j's) for each prompt, the mean over pairings of seeds."""
    total = np.zeros((prompts, len(names), len(names)))
    count = np.zeros_like(total)
    at = {name: number for number, name in enumerate(names)}
    for x in comparisons:
        if math.isfinite(x.preference):
            i, j = at[x.names[0]], at[x.names[1]]
            total[x.item, i, j] += x.preference
            total[x.item, j, i] += 1 - x.preference
            count[x.item, i, j] += 1
            count[x.item, j, i] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _over_baseline(
    names: Sequence[str],
    baseline: str,
    games: np.ndarray,
    matched: Matched,
    given: argparse.Namespace,
) -> dict[str, LengthControlled]:
    """Win rates over the baseline at equal length, with difficulties where there are models."""
    lengths = {
        name: np.mean([[len(x) for x in responses] for responses in seeds], axis=0)
        for name, seeds in matched.responses.items()
    }
    at = names.index(baseline)
    others = [number for number, name in enumerate(names) if name != baseline]
    preference = games[:, others, at].T
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
            confidence=given.confidence,
            resamples=_fits(given),
            seed=given.seed,
        )
        for x, row in zip(others, preference, strict=True)
    }


def _matrix(names: Sequence[str], order: Sequence[int], pairs: Sequence[Pair]) -> Table:
    """Row over column, strongest first."""
    known = {pair.names: pair for pair in pairs}

    def cell(one: str, other: str) -> tuple[float, float]:
        if one == other:
            return 0.5, 0.0
        if (one, other) in known:
            pair = known[one, other]
            return pair.win_rate.rate, pair.seeds.std
        pair = known[other, one]
        return 1 - pair.win_rate.rate, pair.seeds.std

    some_seeds = any(pair.seeds.number > 1 for pair in pairs)
    ordered = [names[at] for at in order]
    cells = [[cell(one, other) for other in ordered] for one in ordered]
    return Table(
        title="Row over column",
        header=["policy", *ordered],
        rows=[
            [
                name,
                *(f"{x:.3f}" + (f" ({std:.3f})" if some_seeds and std else "") for x, std in row),
            ]
            for name, row in zip(ordered, cells, strict=True)
        ],
        shades=[[x for x, _ in row] for row in cells],
        note="Mean preference for the row's policy"
        + (", in brackets the standard deviation over pairings of seeds." if some_seeds else "."),
    )


def _ratings_table(
    names: Sequence[str],
    order: Sequence[int],
    rated: Ratings,
    baseline: str,
    controlled: Mapping[str, LengthControlled],
    matched: Matched,
    given: argparse.Namespace,
) -> Table:
    rows = []
    for at in order:
        name = names[at]
        equal = "baseline"
        if name in controlled:
            own = controlled[name]
            equal = f"{own.rate:.3f} ({own.interval[0]:.3f} – {own.interval[1]:.3f})"
        length = np.mean([len(x) for seed in matched.responses[name] for x in seed])
        rating = [f"{rated.elo[at]:.0f}", f"{rated.low[at]:.0f} – {rated.high[at]:.0f}"]
        rows.append([name, *rating, equal, f"{length:,.0f}"])
    with_difficulty = len(names) > MODELS_FOR_DIFFICULTY
    return Table(
        title="Ratings",
        header=["policy", "Elo", *headings(given), f"over {baseline}, equal length", "characters"],
        rows=rows,
        note="Bradley-Terry strengths of all comparisons together, on Elo's scale with mean 1000 "
        "(400 points: odds of ten to one). Equal length: what a logistic model of the length "
        "difference predicts for responses equally long"
        + (
            ", with a difficulty of each prompt that all policies share."
            if with_difficulty
            else "."
        ),
    )
