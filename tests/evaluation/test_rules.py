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

def long(prompt, response):
    return np.ones(3)

def several(prompt, response):
    return [1.0, 2.0]

def polite(prompt, response):
    return "please" in response

def numpy_polite(prompt, response):
    return np.bool_("please" in response)

def one_number(prompt, response):
    return np.array(len(response))

def typo(prompt, response):
    return respones
"""


RAISES = 'raise KeyError("no such thing")'


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "rules.py"
    path.write_text(RULES)
    make = lambda name: make_annotator(f"rule:{path}:{name}")  # noqa: E731
    make.path = path
    return make


@pytest.mark.parametrize("name", ["length", "weighted", "one_number"])
def test_scores_are_compared(rules, name):
    verdicts = rules(name).preferences(["p"] * 3, ["aa", "b", "cc"], ["b", "aa", "dd"])
    assert verdicts.preference.tolist() == [1.0, 0.0, 0.5]
    assert verdicts.by_order is None
    assert verdicts.order_consistency is None


@pytest.mark.parametrize("name", ["polite", "numpy_polite"])
def test_true_is_better_than_false(rules, name):
    verdicts = rules(name).preferences(["p"] * 2, ["please", "no"], ["no", "no more"])
    assert verdicts.preference.tolist() == [1.0, 0.5]
    assert rules(name).rewards(["p"] * 2, ["please", "no"]).tolist() == [1.0, 0.0]


def test_rewards_that_all_fail_name_rule_and_prompt(rules):
    prompt = "a prompt that goes on and on " * 9
    with pytest.raises(UserError) as error:
        rules("odd").rewards([prompt] * 2, ["none", "nan"])
    said = str(error.value)
    assert "rules.py:odd fails on all 2: it returns a NoneType, not a number; first on" in said
    assert said.endswith(
        "first on prompt 'a prompt that goes on and on a prompt that goes on and on...'"
    )
    assert np.isnan(rules("odd").rewards(["p"] * 2, ["none", "fine"])).tolist() == [True, False]


def test_a_rule_that_evaluates_a_search_fails_one_by_one(rules):
    from jaxalign.evaluation.single_scores import RuleReward
    from jaxalign.modules import find_function

    reward = RuleReward(find_function(f"{rules.path}:odd", "rule"))
    raised, none, fine = reward(["q"] * 3, ["raise", "none", "fine"])
    assert raised.failure.startswith("it raises KeyError: 'no such thing' (at ")
    assert none.failure == "it returns a NoneType, not a number"
    assert (fine.mean, fine.failure) == (1.0, "")


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
        f"it raises KeyError: 'no such thing' (at {rules.path}:15: {RAISES})": 1,
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
        ("long", r"fails on all 1: it returns an array of shape \(3,\), not a number; first on"),
        ("several", "it returns a list of 2, not a number; first on prompt 'p'$"),
        ("typo", r"rule .*rules.py:typo fails on all 1: it raises NameError: .*: return respones"),
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
