"""A file of responses is the same however often it was interrupted."""

import json

import pytest

from jaxalign.backends import Decoding
from jaxalign.backends.cached import AnswerFile, Cached
from jaxalign.data import prompt_records
from jaxalign.data.records import Conversation
from jaxalign.errors import UserError
from jaxalign.evaluation.outputs import policy_files
from jaxalign.evaluation.responses import respond
from tests.backends.scripted import Scripted

DECODING = Decoding(max_tokens=8, temperature=1.0)


@pytest.fixture
def records(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p{n}"}) + "\n" for n in range(5)))
    return list(prompt_records(str(file)))


def model():
    return Scripted(lambda text, sample: f"{text} {sample}")


@pytest.mark.parametrize("kept", range(11))
def test_an_interrupted_file_is_resumed_at_its_last_whole_batch(tmp_path, records, kept):
    path, size = tmp_path / "out.jsonl", {"samples": 2, "batch_size": 2}
    respond(path, model(), records, DECODING, **size)
    whole = path.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    expected = [
        (f"{n + 1}.{sample}", f"p{n}", f"p{n} {sample}") for n in range(5) for sample in (0, 1)
    ]
    assert [(row["id"], row["prompt"], row["response"]) for row in rows] == expected
    lines = whole.splitlines(keepends=True)
    rest = lines[kept][:7] if kept < len(lines) else b""
    path.write_bytes(b"".join(lines[:kept]) + rest)  # a kill in the middle of a line
    again = model()
    respond(path, again, records, DECODING, **size)
    assert path.read_bytes() == whole
    batches = kept // 4 if kept < 10 else 3
    assert again.asked == [f"p{n}" for n in range(5)][2 * batches :]


def test_missing_responses_are_an_error_in_the_end_and_requested_again(tmp_path, records):
    path, lines = tmp_path / "out.jsonl", []
    refusing = Scripted(lambda text, sample: None if text in ("p1", "p3") else "x")
    with pytest.raises(UserError, match=r"prompts.jsonl:2: no text \(and 1 more\); .* lacks 2"):
        respond(path, refusing, records, DECODING, batch_size=2, say=lines.append)
    assert lines == [f"{path}: 3 responses written, 0 cut at 8 tokens"]
    again = Scripted(lambda text, sample: "x")
    respond(path, again, records, DECODING, batch_size=2)
    assert again.asked == [f"p{n}" for n in range(5)]
    assert len(path.read_text().splitlines()) == 5


def test_another_model_settings_or_prompts_are_refused(tmp_path, records):
    path = tmp_path / "out.jsonl"
    respond(path, model(), records, DECODING, settings={"prompt_artefact": None})
    with pytest.raises(UserError, match="made with model 'scripted', not 'other'"):
        respond(path, Scripted(identity="other"), records, DECODING)
    long = "local folder model.safetensors:8:9 tokenizer {} ends (2,)"
    respond(tmp_path / "long.jsonl", Scripted(identity=long.format("ab")), records, DECODING)
    with pytest.raises(UserError, match=r"model '\.\.\. tokenizer ab', not '\.\.\. tokenizer cd'"):
        respond(tmp_path / "long.jsonl", Scripted(identity=long.format("cd")), records, DECODING)
    with pytest.raises(UserError, match="made with max_tokens 8, not 9"):
        respond(path, model(), records, Decoding(max_tokens=9, temperature=1.0))
    with pytest.raises(UserError, match="made with prompt_artefact None, not 'x'"):
        respond(path, model(), records, DECODING, settings={"prompt_artefact": "x"})
    with pytest.raises(UserError, match=r"out.jsonl:1: another prompt than in .*prompts.jsonl"):
        respond(path, model(), records[1:], DECODING)
    (tmp_path / "mine.jsonl").touch()
    with pytest.raises(UserError, match="not made by this command"):
        respond(tmp_path / "mine.jsonl", model(), records, DECODING)


def test_fewer_prompts_delete_no_responses(tmp_path, records):
    path = tmp_path / "out.jsonl"
    respond(path, model(), records, DECODING)
    whole = path.read_bytes()
    with pytest.raises(UserError, match=r"out.jsonl: holds 5 responses, 2 were asked for; set"):
        respond(path, model(), records[:2], DECODING)
    assert path.read_bytes() == whole


def test_tools_stay_with_their_prompt(tmp_path):
    fields = {"prompt": [{"role": "user", "content": "The time?"}], "tools": [{"name": "clock"}]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(fields))
    (record,) = prompt_records(str(tmp_path / "prompts.jsonl"))
    respond(tmp_path / "out.jsonl", model(), [record], DECODING)
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert {name: row[name] for name in fields} == fields


@pytest.mark.parametrize("tools", [[], [{"name": "calendar"}]])
def test_responses_with_other_tools_are_not_taken(tmp_path, tools):
    def written(tools):
        row = {"prompt": [{"role": "user", "content": "The time?"}], "tools": tools}
        (tmp_path / "prompts.jsonl").write_text(json.dumps(row))
        records = list(prompt_records(str(tmp_path / "prompts.jsonl")))
        respond(tmp_path / "out.jsonl", model(), records, DECODING)

    written([{"name": "clock"}])
    written([{"name": "clock"}])
    with pytest.raises(UserError, match=r"out.jsonl:1: another prompt"):
        written(tools)


def test_an_answer_is_kept_for_its_tools_alone(tmp_path):
    turns = [{"role": "user", "content": "The time?"}]
    asked = Scripted(lambda text, sample: "noon")
    cached = Cached(asked, AnswerFile(tmp_path / "answers.jsonl"))
    plain = Conversation(turns)
    clock, calendar = (Conversation(turns, tools=[{"name": x}]) for x in ("clock", "calendar"))
    for prompt, requests in ((plain, 1), (turns, 1), (clock, 2), (calendar, 3), (clock, 3)):
        cached.generate([prompt], DECODING)
        assert len(asked.asked) == requests


def test_policies_are_named_after_their_files():
    assert policy_files("x/one.jsonl", "y/two.jsonl", []) == {
        "one": ["x/one.jsonl"],
        "two": ["y/two.jsonl"],
    }
    assert list(policy_files("x/out.jsonl", "y/out.jsonl", [])) == ["a", "b"]
    files = policy_files(None, None, ["m=1", "n=2", "m=3"], "n")
    assert files == {"m": ["1", "3"], "n": ["2"]}
