"""Rules of a user's own: scores, probabilities, and everything else that they may return."""

import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.evaluation import make_annotator

RULES = """
import numpy as np

def length(prompt, response):
    return len(response)

def weighted(prompt, response, weight=2):
    return np.float32(weight * len(response))

def first_wins(prompt, first, second):
    return 0.9

def odd(prompt, response):
    if response == "raise":
        raise KeyError("no such thing")
    return {"none": None, "text": "7", "nan": float("nan"), "inf": float("inf")}.get(response, 1)

def never(prompt, first, second):
    return 2.0

calls = []

def mends(prompt, response):
    calls.append(response)
    if len(calls) == 1:
        raise OSError("busy")
    return len(response)

def lonely(prompt):
    return 1
"""


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "rules.py"
    path.write_text(RULES)
    return lambda name: make_annotator(f"rule:{path}:{name}")


@pytest.mark.parametrize("name", ["length", "weighted"])
def test_scores_are_compared(rules, name):
    verdicts = rules(name).preferences(["p"] * 3, ["aa", "b", "cc"], ["b", "aa", "dd"])
    assert verdicts.preference.tolist() == [1.0, 0.0, 0.5]
    assert verdicts.by_order is None
    assert verdicts.order_consistency is None


def test_probabilities_are_asked_in_both_orders(rules):
    verdicts = rules("first_wins").preferences(["p"], ["a"], ["b"])
    assert verdicts.preference == pytest.approx([0.5])
    assert verdicts.order_consistency == 0.0


def test_failures_are_counted_and_never_a_win(rules):
    bad = ["raise", "none", "text", "nan", "inf"]
    verdicts = rules("odd").preferences(["p"] * 6, [*bad, "fine"], ["good"] * 6)
    assert np.isnan(verdicts.preference[:5]).all()
    assert verdicts.preference[5] == 0.5
    assert verdicts.failures == {
        "it raises KeyError: 'no such thing'": 1,
        "it returns a NoneType, not a number": 1,
        "it returns a str, not a number": 1,
        "it returns a number that is not finite": 2,
    }
    swapped = rules("odd").preferences(["p"] * 6, ["good"] * 6, [*bad, "fine"])
    assert np.isnan(swapped.preference[:5]).all()


def test_a_failure_is_tried_again(rules):
    assert rules("mends").preferences(["p"], ["a"], ["bb"]).preference.tolist() == [0.0]


def test_equal_texts_are_not_asked(rules):
    assert rules("never").preferences(["p"], ["a"], ["a"]).preference.tolist() == [0.5]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("never", "fails on all 2: it returns a probability outside"),
        ("lonely", "takes 1 arguments"),
        ("absent", "has no function absent"),
    ],
)
def test_rules_that_cannot_be_used(rules, name, words):
    with pytest.raises(UserError, match=words):
        rules(name).preferences(["p"], ["a"], ["b"])


@pytest.mark.parametrize("spec", ["", "oracle:x", "rule", "rule:"])
def test_unknown_kinds_are_told_the_known_ones(spec):
    with pytest.raises(UserError, match=r"rule:FILE.py:FUNCTION, openai:URL#MODEL, lm:FOLDER"):
        make_annotator(spec)
