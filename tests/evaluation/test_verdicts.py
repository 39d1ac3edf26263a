"""Both orders, ties, failures and kept answers, around any judge."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from jaxalign.evaluation import Answer, JudgeAnnotator


class Canned:
    """f(y, y') from a function of the two texts as shown; counts what it is asked."""

    order_free = False
    identity = "canned"

    def __init__(self, function):
        self.function, self.asked = function, Counter()

    def answers(self, prompts, first, second):
        numbered = list(enumerate(zip(prompts, first, second, strict=True)))
        for number, (prompt, x, y) in reversed(numbered):  # answers need not come in order
            self.asked[prompt, x, y] += 1
            value = self.function(x, y)
            yield Answer(number=number, preference=value, reason="silent" if value != value else "")


def biased(rng):
    """Probabilities without any symmetry, the same whenever asked."""
    table = {}
    return lambda x, y: table.setdefault((x, y), float(rng.uniform()))


def test_orders_are_averaged_and_antisymmetric_to_the_last_bit(rng):
    words = [f"response {n}" for n in range(40)]
    first, second = (list(rng.permutation(words * 10)) for _ in range(2))
    judge = Canned(biased(rng))
    annotator = JudgeAnnotator(judge=judge)
    here = annotator.preferences(["p"] * 400, first, second)
    there = annotator.preferences(["p"] * 400, second, first)
    assert (here.preference == 1 - there.preference).all()
    for x, y, p in zip(first, second, here.preference, strict=True):
        expected = 0.5 if x == y else (judge.function(x, y) + 1 - judge.function(y, x)) / 2
        assert p == pytest.approx(expected, abs=1e-15)
    assert all(x != y for _, x, y in judge.asked)


def test_an_order_bias_shows_and_cancels():
    """A judge that gives 0.3 to whatever is shown first beyond the truth of 0.6 against 0.4."""
    judge = Canned(lambda x, y: {"good": 0.6, "bad": 0.4}[x] + 0.3)
    verdicts = JudgeAnnotator(judge=judge).preferences(["p"], ["good"], ["bad"])
    assert verdicts.preference == pytest.approx([0.6])
    assert verdicts.by_order == pytest.approx(np.array([[0.9, 0.3]]))
    assert verdicts.order_consistency == 0.0
    assert verdicts.first_position_rate == pytest.approx(0.8)


def test_a_failure_in_either_order_is_no_verdict():
    judge = Canned(lambda x, y: math.nan if x == "b" else 0.75)
    verdicts = JudgeAnnotator(judge=judge).preferences(["p"] * 3, ["a", "b", "c"], ["b", "c", "d"])
    assert np.isnan(verdicts.preference[:2]).all()
    assert verdicts.failures == {"silent": 2}
    assert verdicts.reasons == ("silent", "silent", "")
    assert verdicts.order_consistency == 0.0  # of the third alone: the first shown wins both times


def test_answers_are_kept_and_only_what_is_missing_is_asked(tmp_path, rng):
    path = tmp_path / "deep" / "answers.jsonl"
    texts = ["q"] * 3, ["a", "b", "c"], ["b", "c", "a"]
    table = biased(rng)
    once = Canned(lambda x, y: math.nan if (x, y) == ("b", "c") else table(x, y))
    JudgeAnnotator(judge=once, answers_file=path).preferences(*texts)
    with path.open("a") as file:
        file.write('{"judge": "canned", "prompt": "cut of')  # a kill
    again = Canned(table)
    verdicts = JudgeAnnotator(judge=again, answers_file=path).preferences(*texts)
    assert again.asked == {("q", "b", "c"): 1}
    fresh = JudgeAnnotator(judge=Canned(table)).preferences(*texts)
    assert (verdicts.preference == fresh.preference).all()
    lines = path.read_text().splitlines()
    assert json.loads(lines[-1])["preference"] == table("b", "c")  # on a line of its own
    other = Canned(table)
    other.identity = "another judge"
    JudgeAnnotator(judge=other, answers_file=path).preferences(*texts)
    assert other.asked.total() == 6


def test_what_came_before_an_interruption_is_kept(tmp_path):
    path = tmp_path / "answers.jsonl"

    def dies(x, y):
        if x == "a":
            raise KeyboardInterrupt
        return 0.5

    judge = JudgeAnnotator(judge=Canned(dies), answers_file=path)
    with pytest.raises(KeyboardInterrupt):
        judge.preferences(["q"] * 2, ["a", "b"], ["z", "z"])
    assert len(path.read_text().splitlines()) == 3  # answered in reverse, "a" first comes last


def test_the_same_question_is_asked_once(rng):
    judge = Canned(biased(rng))
    JudgeAnnotator(judge=judge).preferences(["q"] * 4, ["a", "a", "b", "a"], ["b", "b", "a", "b"])
    assert set(judge.asked.values()) == {1}
    assert len(judge.asked) == 2
