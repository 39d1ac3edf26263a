"""A reward that reads words: Bradley-Terry's model of pairs on words and pairs of words.

The pairs of `methods.JUDGED` fit the judge of a chat model's answers, those of `methods.TRAIN` the
reward of its policy gradient (`polite`). It shares nothing with the models that it judges, and is
fitted in seconds.
"""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from experiments.rahf import methods
from jaxalign.data import preference_records
from jaxalign.evaluation.logistic import fit_logistic

FEWEST, RIDGE = 3, 3.0
"""Responses that a feature is in at least, and the penalty on its weight."""


def features(text: str) -> set[str]:
    """The words of a text and its neighbouring words; the first has its beginning beside it."""
    words = ["<begin>", *re.findall(r"[a-z']+|[!?]", text.lower())]
    return {*words[1:], *(f"{a} {b}" for a, b in itertools.pairwise(words))}


@dataclass(frozen=True, kw_only=True)
class WordReward:
    r"""The sum of the weights of the features that a response has.

    .. math:: P(y \succ y' \mid x) = \sigma\bigl(w^\top \phi(y) - w^\top \phi(y')\bigr)
    """

    weights: dict[str, float]

    def __call__(self, responses: Sequence[str]) -> Float64[np.ndarray, " n"]:
        """The reward of each response; its prompt does not count."""
        return np.array([sum(self.weights.get(x, 0.0) for x in features(y)) for y in responses])

    def accuracy(self, pairs: Sequence[Any]) -> float:
        """The fraction of pairs whose chosen response has the higher reward; equal ones half."""
        sides = ([str(getattr(one, side)) for one in pairs] for side in ("chosen", "rejected"))
        chosen, rejected = map(self, sides)
        return float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected)))


def fitted(pairs: Sequence[Any]) -> WordReward:
    """The reward that explains pairs best, by a logistic regression with a ridge."""
    both = [(features(str(one.chosen)), features(str(one.rejected))) for one in pairs]
    counts = Counter(x for sides in both for side in sides for x in side)
    kept = sorted(x for x, number in counts.items() if number >= FEWEST)
    known = {x: at for at, x in enumerate(kept)}
    design = np.zeros((len(both), len(known)))
    for row, (chosen, rejected) in zip(design, both, strict=True):
        row[[known[x] for x in chosen - rejected if x in known]] = 1.0
        row[[known[x] for x in rejected - chosen if x in known]] = -1.0
    weights = fit_logistic(design, np.ones(len(design)), ridge=RIDGE)
    return WordReward(weights=dict(zip(known, weights.tolist(), strict=True)))


@functools.cache
def of(source: str) -> WordReward:
    """The reward of a source of pairs, fitted once."""
    return fitted(list(preference_records(source)))


def polite(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The reward of the training pairs, for `rollout.reward`."""
    del prompts
    return of(methods.TRAIN)(responses).tolist()
