"""Candidates whose rewards are missing are left out and counted."""

import math

import numpy as np

from jaxalign.backends import Decoding
from jaxalign.collection.best_of_n import rewards_of, sampled_candidates
from jaxalign.evaluation import Verdicts
from tests.backends.scripted import Scripted

BACKEND = Scripted(lambda text, sample: ("good", "bad", "odd")[sample])


class Scores:
    def __init__(self, **rewards):
        self.known = rewards

    def rewards(self, prompts, responses):
        return np.array([self.known.get(text, math.nan) for text in responses])


class Silent:
    """Gives a verdict where neither response is odd."""

    def preferences(self, prompts, first, second):
        odd = ["odd" in pair for pair in zip(first, second, strict=True)]
        return Verdicts(
            preference=np.where(odd, np.nan, [float(x == "good") for x in first]),
            reasons=tuple("odd" if one else "" for one in odd),
        )


def candidates(annotator):
    return list(sampled_candidates(BACKEND, ["p"], annotator, Decoding(temperature=1.0), samples=3))


def test_a_response_without_a_reward_is_no_candidate():
    [found] = candidates(Scores(good=2.0, bad=math.inf))
    assert (found.responses, found.rewards.tolist(), found.without_reward) == (["good"], [2.0], 2)
    [found] = candidates(Scores())
    assert (found.responses, found.rewards.tolist(), found.without_reward) == ([], [], 3)


def test_a_response_without_any_verdict_has_no_reward():
    [rewards] = rewards_of(Silent(), ["p"], [["good", "bad", "odd"]])
    # good beats bad; what has no verdict is a tie: (1 + 1/2) / 2 and (0 + 1/2) / 2
    assert rewards[:2].tolist() == [0.75, 0.25]
    assert math.isnan(rewards[2])
