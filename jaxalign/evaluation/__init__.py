"""Evaluation: who says which of two responses is better, and what follows for policies."""

from jaxalign.evaluation.agreement import Agreement, agreement, cohens_kappa
from jaxalign.evaluation.annotators import (
    Annotator,
    AnnotatorOptions,
    Verdicts,
    make_annotator,
)
from jaxalign.evaluation.bradley_terry import (
    Cycles,
    Pairings,
    Ratings,
    cycles,
    over_seeds,
    ratings,
    strengths,
)
from jaxalign.evaluation.verdicts import Answer, Judge, JudgeAnnotator
from jaxalign.evaluation.win_rates import (
    LengthControlled,
    WinRate,
    bootstrap_mean,
    instruction_difficulty,
    length_controlled,
    wilson,
    win_rate,
)

__all__ = [
    "Agreement",
    "Annotator",
    "AnnotatorOptions",
    "Answer",
    "Cycles",
    "Judge",
    "JudgeAnnotator",
    "LengthControlled",
    "Pairings",
    "Ratings",
    "Verdicts",
    "WinRate",
    "agreement",
    "bootstrap_mean",
    "cohens_kappa",
    "cycles",
    "instruction_difficulty",
    "length_controlled",
    "make_annotator",
    "over_seeds",
    "ratings",
    "strengths",
    "wilson",
    "win_rate",
]
