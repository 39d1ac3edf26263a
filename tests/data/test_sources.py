"""The forms of a record: text, conversations, HH-RLHF's transcripts; and what is held out."""

import dataclasses
import functools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.data import (
    ReadReport,
    preference_records,
    prompt_records,
    response_records,
    split_holdout,
    text_records,
    unpaired_records,
)
from jaxalign.data.forms import split_transcripts
from jaxalign.data.records import PreferenceRecord
from jaxalign.errors import UserError

HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant:"
USER = {"role": "user", "content": "hello"}
TURN = {"role": "assistant", "content": "hi"}
WITH_FIELDS = functools.partial(prompt_records, keep_fields=True)
GRADED = functools.partial(unpaired_records, threshold=0.5)
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


SYSTEM = {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    "prompt",
    [[USER], "hello", " hello", "", None],
)
def test_turns_shared_beyond_the_prompt_are_the_prompt(tmp_path, prompt):
    """Whole conversations bring the system's turn, which the prompt beside them lacks."""
    row = {"prompt": prompt, "chosen": [SYSTEM, USER, TURN], "rejected": [SYSTEM, USER, OTHER]}
    record = one(tmp_path, row)
    assert list(record.prompt) == [SYSTEM, USER]
    assert (list(record.chosen), list(record.rejected)) == ([TURN], [OTHER])


SPACED = USER | {"content": "hello "}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (([USER], [USER, TURN], [SPACED, OTHER]), "no first turn, and one begins with"),
        (("hello", [USER, TURN], [SPACED, OTHER]), "no first turn, and one begins with"),
        (([USER], [SPACED, TURN], [SPACED, OTHER]), "that do not contain the prompt"),
        (("other words", [USER, TURN], [USER, OTHER]), "that do not contain the prompt"),
        (([USER], [TURN], [SYSTEM, OTHER]), "role system"),
        (([USER], [], [OTHER]), "without turns"),
        (([USER, TURN], [USER, TURN, USER, TURN], [USER, TURN, SYSTEM, TURN]), "role user"),
        (
            ("say it", f"{HUMAN}q{ASSISTANT} a", f"{HUMAN}q{ASSISTANT} b"),
            "do not contain the prompt",
        ),
    ],
)
def test_conversations_that_differ_from_their_prompt_are_refused(tmp_path, row, said):
    prompt, chosen, rejected = row
    with pytest.raises(UserError, match=r"x\.jsonl:1: [^\n]*$") as error:
        one(tmp_path, {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert said in str(error.value)


@pytest.mark.parametrize("prompt", ["", " ", f"{HUMAN}q{ASSISTANT}", "q", None])
def test_transcripts_beside_a_prompt_are_cut_at_the_shared_turn(tmp_path, prompt):
    dialogue = f"{HUMAN}q{ASSISTANT}"
    row = {"prompt": prompt, "chosen": f"{dialogue} yes", "rejected": f"{dialogue} no"}
    record = one(tmp_path, row)
    assert (record.prompt, record.chosen, record.rejected) == (dialogue, " yes", " no")


def test_a_response_that_repeats_its_prompt_is_cut(tmp_path):
    for prompt in ([USER], "hello"):
        row = {"prompt": prompt, "response": [USER, TURN]}
        record = one(tmp_path, row, response_records)
        assert (list(record.prompt), list(record.response)) == ([USER], [TURN])
        row = {"prompt": prompt, "completion": [USER, TURN], "label": True}
        assert list(one(tmp_path, row, unpaired_records).completion) == [TURN]


def calling(arguments):
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"x": 1}, {"x": 1}),
        ('{"x": 1}', {"x": 1}),
        (json.dumps('{"x": 1}'), {"x": 1}),  # encoded twice
        ("", {}),
        (None, {}),
        ({"x": None, "y": "1"}, {"x": None, "y": "1"}),  # in JSON a null was meant
    ],
)
def test_arguments_of_calls_are_mappings(tmp_path, written, read):
    row = {"prompt": [USER], "chosen": [calling(written)], "rejected": [OTHER]}
    (call,) = one(tmp_path, row).chosen[0]["tool_calls"]
    assert call == {"function": {"name": "f", "arguments": read}}


def test_calls_as_text_and_without_an_envelope(tmp_path):
    flat = [{"name": "f", "arguments": '{"x": 1}'}]
    for calls in (flat, json.dumps(flat)):
        turn = {"role": "assistant", "content": "", "tool_calls": calls}
        record = one(tmp_path, {"prompt": [USER], "chosen": [turn], "rejected": [OTHER]})
        assert record.chosen[0]["tool_calls"] == [{"name": "f", "arguments": {"x": 1}}]


@pytest.mark.parametrize("written", ["{", "[1]", "3", '"x', [1], 3])
def test_arguments_that_are_no_object_are_named(tmp_path, written):
    row = {"prompt": [USER], "chosen": [calling(written)], "rejected": [OTHER]}
    with pytest.raises(UserError, match=r"x\.jsonl:1: wrong type: tool_calls of turn 1 of chosen"):
        one(tmp_path, row)


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b", "system": "s"}, preference_records),
        ({"prompt": "p", "response": "a", "tools": '[{"name": "f"}]'}, response_records),
        ({"messages": [USER, TURN]}, response_records),
        ({"prompt": "p", "completion": "a", "label": True}, unpaired_records),
        ({"prompt": "p", "response": "a", "score": 1}, unpaired_records),
        ({"prompt": "p", "response": "a", "score": 0.2}, GRADED),
        ({"text": "t"}, text_records),
        ({"prompt": "p", "answer": "4", "kind": {"level": 2}}, WITH_FIELDS),
        ({"messages": [USER], "answer": 4}, WITH_FIELDS),
    ],
)
def test_a_table_gives_the_records_of_the_same_json_lines(tmp_path, row, read):
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    (found,) = read(str(tmp_path / "x.parquet"))
    expected = dataclasses.replace(one(tmp_path, row, read), source=found.source)
    assert found == expected
    if read is WITH_FIELDS:
        assert found.fields == row


def test_nulls_that_fill_up_a_table_go(tmp_path):
    row = [
        {"prompt": [USER], "chosen": [calling(arguments)], "rejected": [OTHER], "tools": tools}
        for arguments, tools in (({"city": "Rome"}, [{"name": "f"}]), ({"day": 3}, [{"size": 2}]))
    ]
    pq.write_table(pa.Table.from_pylist(row), tmp_path / "x.parquet")
    first, second = preference_records(str(tmp_path / "x.parquet"))
    arguments = [r.chosen[0]["tool_calls"][0]["function"]["arguments"] for r in (first, second)]
    assert arguments == [{"city": "Rome"}, {"day": 3}]
    assert (first.prompt.tools, second.prompt.tools) == (({"name": "f"},), ({"size": 2},))


TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]])
@pytest.mark.parametrize("prompt", ["hello", [USER], [SYSTEM, USER]])
@pytest.mark.parametrize(
    ("read", "rest"),
    [
        (preference_records, {"chosen": [TURN], "rejected": [OTHER]}),
        (response_records, {"response": [TURN]}),
        (unpaired_records, {"completion": [TURN], "label": True}),
        (prompt_records, {}),
    ],
)
def test_columns_for_system_and_tools_go_with_the_prompt(tmp_path, tools, prompt, read, rest):
    record = one(tmp_path, {"prompt": prompt, "tools": tools, "system": "be brief"} | rest, read)
    assert list(record.prompt) == [SYSTEM, USER]
    assert record.prompt.tools == tuple(TOOLS)
    plain = isinstance(prompt, str) and read is not preference_records
    assert record.prompt.text == (prompt if plain else None)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"tools": "{"}, "tools is not a list"),
        ({"tools": [3]}, "tools is not a list"),
        ({"tools": 3}, "tools is not a list"),
        ({"system": 3}, "system is a int"),
        ({"system": "be long"}, "two system turns"),
    ],
)
def test_columns_that_cannot_be_used_are_named(tmp_path, columns, said):
    row = {"prompt": [SYSTEM, USER], "chosen": [TURN], "rejected": [OTHER]}
    with pytest.raises(UserError, match=r"x\.jsonl:1: [^\n]*$") as error:
        one(tmp_path, row | columns)
    assert said in str(error.value)


@pytest.mark.parametrize("empty", [{"system": ""}, {"system": None}, {"tools": []}, {"tools": ""}])
def test_empty_columns_change_nothing(tmp_path, empty):
    record = one(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b"} | empty)
    assert record.prompt == "p"


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


CALL = {"type": "function", "function": {"name": "clock", "arguments": {}}}


def test_what_templates_read_is_kept_and_the_rest_is_dropped(tmp_path):
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    answer = {"role": "tool", "content": "3 pm", "name": "clock", "tool_call_id": "7"}
    thought = TURN | {"reasoning_content": "hm", "score": 0.5}
    row = {"prompt": [USER, calls, answer], "chosen": [thought], "rejected": [calls]}
    record = one(tmp_path, row)
    assert list(record.prompt) == [USER, calls | {"content": ""}, answer]
    assert list(record.chosen) == [TURN | {"reasoning_content": "hm"}]
    assert list(record.rejected) == [calls | {"content": ""}]  # a call is no empty response


@pytest.mark.parametrize(
    ("row", "read", "said"),
    [
        # what its reader wrote is no response to learn
        ({"messages": [USER, TURN, USER]}, response_records, "no response: the last turn"),
        ({"prompt": [USER], "chosen": [TURN], "rejected": [USER]}, preference_records, "role user"),
        ({"messages": [USER]}, response_records, "not a list of two turns"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, preference_records, "without turns"),
        ({"prompt": [], "response": "a"}, response_records, "without turns"),
        ({"prompt": [], "completion": "a", "label": True}, unpaired_records, "without turns"),
        ({"prompt": [], "chosen": [TURN], "rejected": [OTHER]}, preference_records, "no first"),
        ({"chosen": [TURN], "rejected": [OTHER]}, preference_records, "no first turn"),
        ({"prompt": 3, "chosen": [TURN], "rejected": [OTHER]}, preference_records, "is a int"),
        (
            {"prompt": [USER], "chosen": [USER, TURN], "rejected": [USER, TURN]},
            preference_records,
            "identical responses",
        ),
        (
            {"prompt": [USER], "chosen": [TURN | {"content": " "}], "rejected": [OTHER]},
            preference_records,
            "empty response: chosen is empty",
        ),
        (
            {"prompt": [USER], "chosen": [TURN | {"content": 0}], "rejected": [OTHER]},
            preference_records,
            "content of turn 1 of chosen is a int",
        ),
        ({"prompt": [USER], "chosen": ["hi"], "rejected": [OTHER]}, preference_records, "turn 1"),
        (
            {"form": "messages", "prompt": "hello", "chosen": "a", "rejected": "b"},
            preference_records,
            "form is messages, but",
        ),
        (
            {"form": "messages", "prompt": 3, "chosen": "a", "rejected": "b"},
            preference_records,
            "form is messages, but",
        ),
        ({"prompt": "p", "chosen": None, "label": True}, unpaired_records, "no chosen"),
        ({"prompt": "p", "completion": "a", "label": 2}, unpaired_records, "label is 2"),
        ({"prompt": "p", "completion": "a", "score": 10**400}, unpaired_records, "label is 1000"),
        ({"prompt": "p", "completion": "a", "score": 10**400}, GRADED, "not a finite number"),
        ({"prompt": "p", "completion": "a", "label": "1"}, GRADED, "label is '1', not a finite"),
        ({"prompt": "p", "completion": "a"}, unpaired_records, "no label"),
        ({"messages": 5}, prompt_records, "messages is a int, not a list of turns"),
        ({"messages": "hello"}, prompt_records, "messages is a str, not a list of turns"),
        ({"messages": 5}, response_records, "messages is a int, not a list of turns"),
        ({"prompt": "p"}, response_records, "no response or completion"),
        ({"response": "p"}, response_records, "no prompt"),
        ({"text": 3}, text_records, "text is a int"),
        ({"text": " "}, text_records, "empty text"),
    ],
)
def test_rows_that_make_no_record_are_named(tmp_path, row, read, said):
    with pytest.raises(UserError, match=r"x\.jsonl:1: [^\n]*$") as error:
        one(tmp_path, row, read)
    assert said in str(error.value)


def test_a_column_of_nulls_is_not_there(tmp_path):
    """A table of several kinds of records has every column in every row."""
    absent = {"chosen": None, "rejected": None, "messages": None}
    assert one(tmp_path, {"prompt": "p", "response": "r"} | absent, response_records).response
    row = {"prompt": "p", "completion": "r", "label": False} | absent
    assert one(tmp_path, row, unpaired_records).completion == "r"


@pytest.mark.weights
@pytest.mark.parametrize(
    ("name", "read", "kept", "skipped"),
    [
        ("harmless-base-test.jsonl.gz", preference_records, 2308, {"empty response": 4}),
        ("hh_harmless_base_test.jsonl", preference_records, 2308, {}),
        ("imdb_same_movie_test.jsonl", preference_records, 2402, {}),
        ("imdb_same_movie_train.jsonl", preference_records, 2780, {}),
        ("llamafactory_dpo_en.jsonl", preference_records, 114, {}),
        ("model_written_evals.jsonl#[-9000:]", preference_records, 9000, {}),
        ("rasbt_instruction_preference.jsonl", preference_records, 1094, {}),
        ("truthfulqa_pairs.jsonl", preference_records, 2518, {}),
        ("ultrafeedback_eval.jsonl", preference_records, 199, {}),
        ("ultrafeedback_train.jsonl", preference_records, 994, {}),
        (
            "ultrafeedback_train_label_flip_20.jsonl",
            preference_records,
            994,
            {"empty response": 2, "identical responses": 4},
        ),
        ("kto_truthfulqa.jsonl", unpaired_records, 22_367, {"empty response": 67}),
    ],
)
def test_real_sets_are_read_whole_but_for_their_faults(shared, name, read, kept, skipped):
    source = str(shared / "preferences" / name)
    report = ReadReport()
    assert sum(1 for _ in read(source, bad_records="skip", report=report)) == kept
    assert dict(report.skipped) == skipped
    if skipped:
        with pytest.raises(UserError, match=rf"{name}:\d+: ({'|'.join(skipped)})"):
            list(read(source))


@pytest.mark.weights
def test_real_transcripts_are_cut_as_others_cut_them(shared):
    """The publisher's transcripts, against a file of prompts and responses made by others."""
    folder = shared / "preferences"
    raw, made = (
        [
            (r.prompt, r.chosen, r.rejected)
            for r in preference_records(str(file), bad_records="skip")
        ]
        for file in (
            folder / "harmless-base-test.jsonl.gz",
            folder / "hh_harmless_base_test.jsonl",
        )
    )
    assert raw == made


def test_pairs_are_a_liked_and_a_disliked_completion(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    records = list(unpaired_records(str(tmp_path / "x.jsonl")))
    assert [(r.completion, r.label) for r in records] == [("a", True), ("b", False)]


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
