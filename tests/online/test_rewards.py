"""Reward functions: what they are passed, what they may return, and what is said if they do not."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from jaxalign.data import prompt_records
from jaxalign.errors import UserError
from jaxalign.online import ALGORITHMS
from jaxalign.online.rewards import reward_function, reward_functions, split_weight
from jaxalign.online.sampler import annotate

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "online.md"
FUNCTIONS = """
def length(prompts, responses):
    return [len(text) for text in responses]

def matches(prompts, responses, answer, scale=None):
    return [(text == right) * (2 if scale is None else scale[0])
            for text, right in zip(responses, answer)]

def everything(prompts, responses, **fields):
    return [sorted(fields).index("answer") for _ in responses]

def short(prompts, responses):
    return [1.0]

def nan(prompts, responses):
    return [0.0] + [float("nan")] * (len(responses) - 1)

def nothing(prompts, responses):
    return None

def missing(prompts, responses):
    return [None for _ in responses]

def text(prompts, responses):
    return ["1" for _ in responses]

def fails(prompts, responses):
    return [1 / 0]

def alone(responses):
    return []
"""
GSM8K = [
    {
        "prompt": "Natalia sold clips to 48 of her friends in April, and half as many in May.",
        "response": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72",
        "source": "gsm8k/train",
    },
    {"prompt": "Cost?", "response": "It is 1,200.\n#### 1,200", "source": "gsm8k/train"},
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(FUNCTIONS)


def test_a_weight_may_follow_the_name():
    assert split_weight("own.py:length") == ("own.py:length", 1.0)
    assert split_weight("own.py:length:-0.5") == ("own.py:length", -0.5)
    assert split_weight("own.py:inf") == ("own.py:inf", 1.0)
    one = reward_function("own.py:matches:2")
    assert (one.name, one.weight, one.needed, one.fields) == (
        "matches",
        2.0,
        ("answer",),
        ("answer", "scale"),
    )


def test_functions_get_the_fields_that_they_name():
    records = [{"answer": "a", "x": 1}, {"answer": "b"}]
    of = reward_function("own.py:matches")
    assert of(["p", "q"], ["a", "a"], records).tolist() == [2.0, 0.0]
    assert of(["p"], ["a"], [{"answer": "a", "scale": 5}]).tolist() == [5.0]
    found = reward_function("own.py:everything")(["p", "q"], ["a", "a"], records)
    assert found.tolist() == [0.0, 0.0]
    with pytest.raises(
        UserError, match=r"^data.jsonl:3: no field answer, which rollout.reward own"
    ):
        reward_functions(["own.py:matches"]).check_record({"x": 1}, "data.jsonl:3")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("short", "short returned 1 rewards for 2 responses"),
        ("nan", "nan returned nan for the response 'b' to 'q'"),
        ("nothing", "nothing returned a NoneType, not a list of numbers"),
        ("missing", "missing returned a NoneType, not a number, for the response 'a' to 'p'"),
        ("text", "text returned a str, not a number"),
        ("fails", "ZeroDivisionError"),
    ],
)
def test_what_a_function_returns_wrongly_is_one_line(name, text):
    with pytest.raises(UserError, match=text) as error:
        reward_function(f"own.py:{name}")(["p", "q"], ["a", "b"], [])
    assert len(str(error.value).splitlines()) == 1
    assert str(error.value).startswith(f"rollout.reward: own.py:{name}")


def test_names_that_are_wrong():
    with pytest.raises(UserError, match=r"must take \(prompts, responses\)"):
        reward_function("own.py:alone")
    with pytest.raises(UserError, match="the weight inf is not finite"):
        reward_function("own.py:length:inf")
    with pytest.raises(UserError, match="2 functions have the name length"):
        reward_functions(["own.py:length", "own.py:length:2"])
    with pytest.raises(UserError, match="has no function other"):
        reward_function("own.py:other")


def test_rewards_are_added_with_weights_and_compared_where_an_algorithm_reads_preferences():
    functions = reward_functions(["own.py:length:0.5", "own.py:matches"])
    texts, records = [["aa", "b"], ["c", "c"]], [{"answer": "b"}, {"answer": "x"}]
    said = annotate(functions, ALGORITHMS["grpo"](samples=2), ["p", "q"], texts, records)
    np.testing.assert_allclose(said.reward, [[1.0, 2.5], [0.5, 0.5]])
    assert {name: x.tolist() for name, x in said.parts.items()} == {
        "length": [[2.0, 1.0], [1.0, 1.0]],
        "matches": [[0.0, 2.0], [0.0, 0.0]],
    }
    said = annotate(functions, ALGORITHMS["online_ipo"](), ["p", "q"], texts, records)
    np.testing.assert_allclose(said.preference[0], [[0.5, 0], [1, 0.5]])
    np.testing.assert_allclose(said.preference[1], 0.5)


def test_the_guides_reward_reads_the_answers_of_gsm8k(tmp_path):
    [code] = re.findall(r"```python\n(# my_rewards.py.*?)```", GUIDE.read_text(), re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(code)
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
    records = list(prompt_records(str(path), keep_fields=True))
    assert prompt_records(str(path)).__next__().fields == {}
    functions = reward_functions(["my_rewards.py:right", "my_rewards.py:shows_answer:0.1"])
    for record in records:
        functions.check_record(record.fields, str(path))
    prompts = [record.prompt for record in records for _ in range(3)]
    fields = [record.fields for record in records for _ in range(3)]
    responses = ["So #### 72", "#### 71.", "72", "#### 1200.", "#### 1,200", "none"]
    rewards = functions(prompts, responses, fields)
    assert rewards["right"].tolist() == [1, 0, 0, 1, 1, 0]
    np.testing.assert_allclose(functions.total(rewards), [1.1, 0.1, 0, 1.1, 1.1, 0])
