"""The paper's plan for DRPO: its settings, its cost, and all of it against a server here."""

import json
from pathlib import Path

import pytest

from experiments.drpo import paper
from tests.backends.scripted import Scripted
from tests.backends.server import Server

pytestmark = pytest.mark.weights


@pytest.fixture
def here(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper, "DATA", shared)
    return tmp_path


def test_the_released_settings(here, capsys):
    assert paper.write_inputs(here / "out") == (16, 180)
    paper.main(["--output", "out", "--judge", "openai:http://127.0.0.1:9#m", "--prices", "1", "2"])
    said = capsys.readouterr().out
    [drpo] = [line for line in said.splitlines() if "out/drpo " in line]
    for flag in ("--width 2", "--actions 3", "--depth 19", "--more-depth 10", "--examples 2"):
        assert flag in drpo
    assert "--examples-at-inference 3" in drpo
    assert "--iterations 0" in drpo  # the released examples have been rewritten
    assert not any((here / "out" / name).exists() for name in paper.ABLATIONS)
    # a local model is free: 199 judgements, 38 choices of criteria, 174 prompts
    [line] = [line for line in said.splitlines() if line.startswith("| search: drpo ")]
    asked, written = 199 * 1000 + 38 * 500 + 174 * 1500, 199 * 350 + 38 * 120 + 174 * 500
    assert line.endswith(f"| {(asked + 2 * written) / 1e6:.2f} |")


def test_urials_prompt_is_its_instruction_and_three_examples(here):
    found = paper.read_urial()
    assert found.system_prompt.startswith("Below is a list of conversations")
    assert found.system_prompt.endswith("controversial topics.")
    assert [one.query.split()[0] for one in found.examples] == ["What", "You", "Can"]
    assert found.shown == 3
    assert not any("`" in one.query + one.response for one in found.examples)


def answer(text, sample):
    """A model, a judge that likes a certain word, and an optimiser that adds it."""
    if "Choose the criteria" in text:
        return json.dumps({"reasoning": "r", "criteria": ["Depth", "Clarity"]})
    if "You judge a response" in text:
        names = [line[2:].split(":")[0] for line in text.splitlines() if line.startswith("- ")]
        said = text.split("[Response]")[1].split("[Criteria]")[0]
        score = min(5, 2 + said.count("well"))
        return json.dumps({name: {"reason": "r", "score": score} for name in names})
    if "Write a better system prompt." in text:
        now = text.split("[Current system prompt]\n")[1].split("\n\n[Earlier")[0]
        return json.dumps(
            {"new_system_prompt": f"{now} Answer well.", "analysis": "", "thought": ""}
        )
    return "well " * text.count("Answer well.") + "said"


def test_all_of_it_against_a_server(here, capsys):
    server = Server(Scripted(answer))
    address = f"openai:{server.address}"
    flags = ["--model", address, "--judge", address, "--completions", "--output", "out"]
    flags += ["--only", "bare", "drpo", "drpo_1_examples", "--limit", "2"]
    try:
        paper.main([*flags, "--estimate"])
        assert not server.asked
        paper.main([*flags, "--run"])
        asked = len(server.asked)
        paper.main([*flags, "--run"])  # all is kept
        assert len(server.asked) == asked
    finally:
        server.close()
    bound = 199 + 199 + 38 + 174 + 3 * 2 * 2
    assert asked <= bound
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    means = {row[1].strip(): row[2].strip() for row in rows if len(row) > 8 and row[2].strip()}
    assert means["bare"] == "2.00"
    assert float(means["drpo"]) == 5.0  # three times well is full marks
    found = json.loads(Path("out/drpo_1_examples/prompt.json").read_text())
    assert found["shown"] == 1
    assert found["system_prompt"].count("Answer well.") >= 3
