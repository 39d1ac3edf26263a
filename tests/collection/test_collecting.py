"""Methods on a file of prompts: files, statistics and resuming, with a scripted model."""

import json

import pytest

from jaxalign.backends import Decoding
from jaxalign.collection import BestOfN, SelfAlignment, SimulatedSociety, collect
from jaxalign.collection.collecting import FILES
from jaxalign.errors import UserError
from tests.backends.scripted import Scripted

DRAWN = Decoding(max_tokens=8, temperature=1.0)


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "rules.py").write_text("def longer(prompt, response):\n    return len(response)\n")
    rows = [json.dumps({"prompt": f"question {number}"}) for number in range(3)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    backend = Scripted(lambda text, sample: f"a{'b' * sample}")
    monkeypatch.setattr("jaxalign.collection.collecting.make_backend", lambda *_: backend)

    def run(method, decoding=DRAWN, **options):
        return collect(
            method,
            model="m",
            prompts=str(tmp_path / "prompts.jsonl"),
            folder=tmp_path / "out",
            decoding=decoding,
            **options,
        )

    run.annotator = f"rule:{tmp_path / 'rules.py'}:longer"
    return run


def test_the_same_call_requests_nothing_twice(run):
    method = BestOfN(annotator=run.annotator, samples=3)
    first = run(method)
    pairs = first.path.read_bytes()
    assert (first.requests, first.statistics["pairs"]) == (3, 3)
    row = json.loads(pairs.splitlines()[0])
    assert (row["chosen"], row["rejected"]) == ("abb", "a")
    assert row["provenance"]["rewards"] == [3.0, 1.0]
    assert row["provenance"]["from"].endswith("prompts.jsonl:1")
    again = run(method)
    assert (again.requests, again.path.read_bytes()) == (0, pairs)
    file = json.loads((first.path.parent / "statistics.json").read_text())
    assert file["pairs"] == 3


def test_older_files_stay_until_all_is_made(run, monkeypatch):
    first = run(SelfAlignment(), most_similar=1.0)
    folder = first.path.parent
    (folder / "pairs.jsonl").write_text("older pairs\n")
    (folder / "sft.jsonl").write_text("older responses\n")

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxalign.collection.self_alignment.aligned_row", stopped)
    monkeypatch.setattr("jaxalign.collection.self_alignment._fault", lambda *_: "")
    with pytest.raises(KeyboardInterrupt):
        run(SelfAlignment())
    assert (folder / "pairs.jsonl").read_text() == "older pairs\n"
    assert (folder / "sft.jsonl").read_text() == "older responses\n"


@pytest.mark.parametrize("select", ["best-worst", "raft"])
def test_tools_and_system_turns_stay_with_their_prompt(run, tmp_path, select):
    tools = [{"type": "function", "function": {"name": "clock"}}]
    fields = {"prompt": "The time?", "system": "Be brief.", "tools": tools}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(fields))
    found = run(BestOfN(annotator=run.annotator, samples=3, select=select))
    file = found.path if select == "best-worst" else found.path.with_name("sft.jsonl")
    row = json.loads(file.read_text().splitlines()[0])
    assert {name: row[name] for name in fields} == fields


def test_every_file_of_a_method_is_known(run):
    for method in (BestOfN(annotator=run.annotator, select="raft"), SelfAlignment()):
        folder = run(method).path.parent
    run(SimulatedSociety(side=2, rounds=1))
    assert {path.name for path in folder.iterdir()} <= set(FILES)


def test_a_limit_counts_prompts_from_the_first(run):
    found = run(BestOfN(annotator=run.annotator, samples=2, select="rrhf"), limit=2)
    assert (found.requests, found.statistics["prompts"]) == (2, 2)


def test_samples_that_are_all_the_same_are_refused(run):
    with pytest.raises(UserError, match="temperature: at 0"):
        run(BestOfN(annotator=run.annotator), decoding=Decoding(max_tokens=8))
    with pytest.raises(UserError, match="samples: "):
        run(BestOfN(annotator=run.annotator, samples=1))


def test_responses_that_cannot_be_used_are_counted(run):
    found = run(SelfAlignment())
    assert found.statistics["faults"] == {"thoughts: no rule is named": 3}
    assert (found.statistics["sft"], found.statistics["pairs"]) == (0, 0)
