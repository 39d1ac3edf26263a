"""Tables and drawings of policies that were judged side by side."""

from collections.abc import Sequence

import numpy as np

from jaxalign.evaluation.comparisons import MODELS_FOR_DIFFICULTY, PolicyPair, Standings
from jaxalign.evaluation.judging import JudgingOptions, Part
from jaxalign.evaluation.outputs import Matched
from jaxalign.evaluation.win_rates import LengthControlled
from jaxalign.reporting.judging_page import Intervals, Table

EQUAL_LENGTH = (
    "Equal length: what a logistic model of the length difference predicts for responses equally "
    "long"
)


def pair_table(pairs: Sequence[PolicyPair], options: JudgingOptions) -> Table:
    """A row for each pair of policies."""
    some_seeds = any(pair.seeds.number > 1 for pair in pairs)
    header = [
        "policies",
        "win rate",
        options.interval_heading,
        "Wilson's",
        "won/tied/lost",
        "no verdict",
        "equal length",
    ]
    rows = []
    for pair in pairs:
        own = pair.win_rate
        row = [
            " over ".join(pair.names),
            f"{own.rate:.3f}",
            f"{own.bootstrap[0]:.3f} – {own.bootstrap[1]:.3f}",
            f"{own.wilson[0]:.3f} – {own.wilson[1]:.3f}",
            f"{own.wins}/{own.ties}/{own.losses}",
            str(own.failures),
            _with_interval(pair.length_controlled),
        ]
        seeds = f"{pair.seeds.mean:.3f} ± {pair.seeds.std:.3f} ({pair.seeds.number})"
        rows.append([*row, seeds] if some_seeds else row)
    return Table(
        title="Win rates",
        header=[*header, "over seeds"] if some_seeds else header,
        rows=rows,
        note="Mean preference for the first policy, ties counted as halves; the interval is the "
        "bootstrap's over prompts, Wilson's treats every comparison as independent. "
        f"{EQUAL_LENGTH}. Comparisons without a verdict are left out of the rest."
        + (" Over seeds: mean and standard deviation of all pairings." if some_seeds else ""),
    )


def standings_parts(
    standings: Standings, pairs: Sequence[PolicyPair], matched: Matched, options: JudgingOptions
) -> list[Part]:
    """Ratings as a table and as a drawing, and the matrix of policies, the strongest first."""
    names, rated = list(matched.responses), standings.ratings
    order = np.argsort(-rated.elo, kind="stable")
    ordered = [names[at] for at in order]
    return [
        _ratings_table(standings, order, matched, options),
        Intervals(
            title=f"Elo, with {options.confidence:.0%} intervals over prompts",
            labels=ordered,
            values=rated.elo[order].tolist(),
            low=rated.low[order].tolist(),
            high=rated.high[order].tolist(),
        ),
        _matrix(ordered, pairs),
    ]


def _ratings_table(
    standings: Standings, order: np.ndarray, matched: Matched, options: JudgingOptions
) -> Table:
    names, rated = list(matched.responses), standings.ratings
    rows = []
    for at in order:
        name = names[at]
        own = standings.over_baseline.get(name)
        equal = "baseline" if own is None else _with_interval(own)
        length = np.mean([len(x) for seed in matched.responses[name] for x in seed])
        rating = [f"{rated.elo[at]:.0f}", f"{rated.low[at]:.0f} – {rated.high[at]:.0f}"]
        rows.append([name, *rating, equal, f"{length:,.0f}"])
    difficulty = ", with a difficulty of each prompt that all policies share"
    return Table(
        title="Ratings",
        header=[
            "policy",
            "Elo",
            options.interval_heading,
            f"over {standings.baseline}, equal length",
            "characters",
        ],
        rows=rows,
        note="Bradley-Terry strengths of all comparisons together, on Elo's scale with mean 1000 "
        f"(400 points: odds of ten to one). {EQUAL_LENGTH}"
        f"{difficulty if len(names) > MODELS_FOR_DIFFICULTY else ''}.",
    )


def _matrix(names: Sequence[str], pairs: Sequence[PolicyPair]) -> Table:
    """Row over column."""
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
    cells = [[cell(one, other) for other in names] for one in names]
    return Table(
        title="Row over column",
        header=["policy", *names],
        rows=[
            [
                name,
                *(f"{x:.3f}" + (f" ({std:.3f})" if some_seeds and std else "") for x, std in row),
            ]
            for name, row in zip(names, cells, strict=True)
        ],
        shades=[[x for x, _ in row] for row in cells],
        note="Mean preference for the row's policy"
        + (", in brackets the standard deviation over pairings of seeds." if some_seeds else "."),
    )


def _with_interval(own: LengthControlled) -> str:
    return f"{own.rate:.3f} ({own.interval[0]:.3f} – {own.interval[1]:.3f})"
