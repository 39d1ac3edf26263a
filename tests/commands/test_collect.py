"""`jaxalign collect`, each way on a real model, killed and gone on with."""

import json
from pathlib import Path

import pytest

from jaxalign.cli import main
from jaxalign.data import preference_records

pytestmark = pytest.mark.weights


@pytest.fixture
def command(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = "Tom", "Lily", "Ben"
    rows = [json.dumps({"prompt": f"Once upon a time {name} had a"}) for name in names]
    Path("prompts.jsonl").write_text("\n".join(rows))
    Path("rules.py").write_text("def longer(prompt, response):\n    return float(len(response))\n")

    def run(way, *more):
        model = str(shared / "models" / "stories260K")
        flags = ["--model", model, "--prompts", "prompts.jsonl", "--output", way]
        return main(["collect", way, *flags, "--max-tokens", "8", "--batch-size", "2", *more])

    return run


def statistics(way):
    return json.loads(Path(way, "statistics.json").read_text())


def test_best_of_n(command, capsys):
    more = "--annotator", "rule:rules.py:longer", "--samples", "3"
    assert command("best-of-n", *more) == 0
    path = Path("best-of-n", "pairs.jsonl")
    pairs = list(preference_records(str(path)))
    assert len(pairs) == statistics("best-of-n")["pairs"] > 0
    assert all(len(pair.chosen) > len(pair.rejected) for pair in pairs)
    whole = path.read_bytes()
    answers = Path("best-of-n", "answers.jsonl")
    answers.write_bytes(b"".join(answers.read_bytes().splitlines(keepends=True)[:2]))  # a kill
    assert command("best-of-n", *more) == 0
    assert path.read_bytes() == whole
    capsys.readouterr()
    assert command("best-of-n", *more) == 0
    assert "new requests: 0" in capsys.readouterr().out
    assert command("best-of-n", *more, "--select", "raft", "--keep", "0.3") == 0
    assert statistics("best-of-n")["sft"] == 3
    assert command("best-of-n", *more, "--select", "rrhf") == 0
    assert statistics("best-of-n")["pairs"] >= len(pairs)
    assert command("best-of-n", *more, "--select", "rso", "--beta", "5") == 0


def test_constitutional(command, shared):
    principles = [{"name": "short", "critique": "Is it long?", "revision": "Say it shorter."}]
    Path("principles.json").write_text(json.dumps(principles))
    flags = "constitutional", "--principles", "principles.json", "--revisions", "1"
    assert command(*flags) == 0
    found = statistics("constitutional")
    assert found["pairs"] == found["sft"] == 0  # the model does not end within 8 tokens
    assert found["faults"]["revision: cut at max_tokens"] > 0
    assert command(*flags, "--keep-cut") == 0
    found = statistics("constitutional")
    assert found["traces"] == 3
    assert found["pairs"] + sum(found["left_out"].values()) == 3
    assert found["sft"] + sum(found["faults"].values()) == found["steps"] == 3


def test_self_align(command):
    rules = {"rules": [{"name": "kind", "text": "be kind"}]}
    Path("rules.json").write_text(json.dumps(rules))
    assert command("self-align", "--rules", "rules.json") == 0
    found = statistics("self-align")
    assert found["sft"] + sum(found["faults"].values()) == found["prompts"] == 3
    Path("rules.json").write_text('{"rules": []}')
    assert command("self-align", "--rules", "rules.json") == 2


def test_society(command):
    pairs = [{"prompt": f"Is {n} red?", "chosen": "Yes.", "rejected": "No."} for n in "abc"]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    more = "--memories", "pairs.jsonl", "--world", "half_half", "--each", "2"
    assert command("society", "--side", "2", "--rounds", "1", "--neighbours", "1", *more) == 0
    found = statistics("society")
    assert found["encounters"] == found["feedback"] == 4
    assert found["feedback_rated"] == 0  # a model of three words rates nothing


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--samples", "1"), "a best and a worst need two"),
        (("--temperature", "0"), "at 0 all samples are the same"),
        (("--samples", "0"), "--samples: 0 is not in [1, inf)"),
    ],
)
def test_one_line_errors(command, capsys, more, words):
    assert command("best-of-n", "--annotator", "rule:rules.py:longer", *more) == 2
    assert words in capsys.readouterr().err
