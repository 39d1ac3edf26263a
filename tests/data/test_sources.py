"""The forms of a record: text, conversations, HH-RLHF's transcripts; and what is held out."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.data import (
    chosen_responses,
    preference_records,
    response_records,
    split_holdout,
    unpaired_records,
)
from jaxalign.data.records import PreferenceRecord
from jaxalign.data.sources import split_transcripts

HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant:"
USER = {"role": "user", "content": "hello"}
TURN = {"role": "assistant", "content": "hi"}
OTHER = {"role": "assistant", "content": "no"}


def one(tmp_path, row, read=preference_records):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (record,) = read(str(path))
    return record


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        # one turn
        (f"{HUMAN}q{ASSISTANT} yes", f"{HUMAN}q{ASSISTANT} no", f"{HUMAN}q{ASSISTANT}"),
        # responses that begin alike: the prompt still ends at the turn
        (f"{HUMAN}q{ASSISTANT} I can", f"{HUMAN}q{ASSISTANT} I cannot", f"{HUMAN}q{ASSISTANT}"),
        # the last of several shared turns
        (
            f"{HUMAN}a{ASSISTANT} b{HUMAN}c{ASSISTANT} d",
            f"{HUMAN}a{ASSISTANT} b{HUMAN}c{ASSISTANT} e",
            f"{HUMAN}a{ASSISTANT} b{HUMAN}c{ASSISTANT}",
        ),
        # they part at the first answer: what follows belongs to the responses
        (
            f"{HUMAN}a{ASSISTANT} b{HUMAN}c{ASSISTANT} d",
            f"{HUMAN}a{ASSISTANT} x{HUMAN}c{ASSISTANT} d",
            f"{HUMAN}a{ASSISTANT}",
        ),
        # the mark inside a text is no turn without its blank line
        (
            f"{HUMAN}say Assistant: now{ASSISTANT} b Assistant: c",
            f"{HUMAN}say Assistant: now{ASSISTANT} b Assistant: d",
            f"{HUMAN}say Assistant: now{ASSISTANT}",
        ),
        # one is the beginning of the other
        (f"{HUMAN}q{ASSISTANT} yes", f"{HUMAN}q{ASSISTANT} yes, sir", f"{HUMAN}q{ASSISTANT}"),
    ],
)
def test_the_prompt_of_transcripts_ends_at_the_last_shared_assistant_turn(
    tmp_path, chosen, rejected, prompt
):
    record = one(tmp_path, {"chosen": chosen, "rejected": rejected})
    assert record.prompt == prompt
    assert record.prompt + record.chosen == chosen
    assert record.prompt + record.rejected == rejected


@given(
    turns=st.lists(st.text("ab\n:A", max_size=4), min_size=1, max_size=3),
    chosen=st.text("ab HuA:\n", min_size=1, max_size=6),
    rejected=st.text("ab HuA:\n", min_size=1, max_size=6),
)
def test_transcripts_are_cut_but_never_changed(turns, chosen, rejected):
    begun = "".join(f"{HUMAN}{turn}{ASSISTANT}" for turn in turns)
    prompt, first, second = split_transcripts(begun + chosen, begun + rejected)
    assert (prompt + first, prompt + second) == (begun + chosen, begun + rejected)
    assert prompt.startswith(begun)
    assert prompt.endswith(ASSISTANT)
    shared = [first[: first.rfind(ASSISTANT) + 1], second[: second.rfind(ASSISTANT) + 1]]
    assert not (shared[0] and shared[0] == shared[1])  # no later turn is shared


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [TURN], "rejected": [OTHER]},
        {"prompt": [USER], "chosen": [USER, TURN], "rejected": [USER, OTHER]},
        {"chosen": [USER, TURN], "rejected": [USER, OTHER]},
        {"prompt": "hello", "chosen": [TURN], "rejected": [OTHER]},
        {"prompt": "hello", "chosen": [USER, TURN], "rejected": [USER, OTHER]},
    ],
)
def test_conversations_are_split_whether_or_not_they_repeat_the_prompt(tmp_path, row):
    record = one(tmp_path, row)
    assert list(record.prompt) == [USER]
    assert list(record.chosen) == [TURN]
    assert list(record.rejected) == [OTHER]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "response": "r"},
        {"prompt": "p", "completion": "r"},
        {"prompt": "p", "chosen": "r", "rejected": "x"},
    ],
)
def test_responses_have_several_names(tmp_path, row):
    record = one(tmp_path, row, response_records)
    assert (record.prompt, record.response) == ("p", "r")


def test_the_last_message_is_the_response(tmp_path):
    record = one(tmp_path, {"messages": [USER, TURN]}, response_records)
    assert (list(record.prompt), list(record.response)) == ([USER], [TURN])


def test_pairs_are_a_liked_and_a_disliked_completion(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    records = list(unpaired_records(str(tmp_path / "x.jsonl")))
    assert [(r.completion, r.label) for r in records] == [("a", True), ("b", False)]


def test_chosen_responses_keep_their_place():
    record = PreferenceRecord(prompt="p", chosen="a", rejected="b", source="f", line=7)
    (response,) = chosen_responses([record])
    assert (response.prompt, response.response, response.line) == ("p", "a", 7)


def records(prompts):
    return [
        PreferenceRecord(prompt=p, chosen=str(i), rejected="x", source="", line=i)
        for i, p in enumerate(prompts)
    ]


def test_a_prompt_is_on_one_side_and_stays_there():
    some = records([f"prompt {i % 500}" for i in range(1500)])
    train, held_out = split_holdout(some, 0.2)
    assert sorted(r.line for r in train + held_out) == list(range(1500))
    sides = [{r.prompt for r in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert 0.14 < len(sides[1]) / 500 < 0.26  # 0.2 +- three standard errors
    fewer = split_holdout(some[::3], 0.2)[1]
    assert {r.prompt for r in fewer} <= sides[1]
    assert {r.prompt for r in split_holdout(some, 0.2, seed=1)[1]} != sides[1]
    assert sides[1] <= {r.prompt for r in split_holdout(some, 0.3)[1]}
