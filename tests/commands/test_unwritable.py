"""An output that cannot be written is one line and exit status 2, before any work."""

import json

import pytest

from jaxalign.cli import main

ROW = json.dumps({"prompt": "q", "response": "r", "chosen": "yes", "rejected": "no"}) + "\n"
MODEL = ("--model", "./absent")  # that it is absent is said later
COMMANDS = {
    "train": ("small.py", "--output", "{}"),
    "generate": (*MODEL, "--prompts", "absent.jsonl", "--output", "{}"),
    "judge": ("--a", "absent.jsonl", "--b", "rows.jsonl", "--judge", "rule:x:y", "--output", "{}"),
    "collect": ("society", *MODEL, "--prompts", "absent.jsonl", "--output", "{}"),
    "convert": ("./absent", "{}"),
    "filter": (*MODEL, "--data", "absent.jsonl", "--output", "{}"),
    "steer": (*MODEL, "--data", "absent.jsonl", "--output", "{}"),
    "entangle": (*MODEL, "--data", "absent.jsonl", "--output", "{}"),
    "report": ("run", "--output", "{}"),
    "optimize-prompt": (*MODEL, "--seeds", "rows.jsonl", "--search", "none", "--output", "{}"),
    "plan": ("small.py", "--topology", "absent", "--json", "{}"),
}
FILES = ("generate", "filter", "steer", "plan", "convert")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROW * 3)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "small.py").write_text(
        "from jaxalign.config import TrainConfig\n\ndef config():\n"
        "    return TrainConfig(name='small', data='./absent.jsonl')\n"
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"name": "run"}')
    (tmp_path / "run" / "metrics.jsonl").touch()
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("file/x", "Not a directory"),
        ("file/x/y", "Not a directory"),
        ("/proc/x/y", "No such file or directory"),
        ("x" * 300, "File name too long"),
    ],
)
def test_an_output_that_cannot_be_written_is_named(folder, capsys, command, output, reason):
    option = {"plan": "--json", "convert": "TARGET"}.get(command, "--output")
    arguments = [one.format(output) for one in COMMANDS[command]]
    assert main([command, *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    written = f"{output}/small" if command == "train" else output
    assert line == f"jaxalign {command}: {written}: cannot be written: {reason}; set {option}"
    assert (folder / "file").read_text() == "mine"


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - set(FILES)))
def test_a_file_in_place_of_a_folder_is_named(folder, capsys, command):
    (folder / "small").write_text("mine")
    output = "." if command == "train" else "small"
    assert main([command, *(one.format(output) for one in COMMANDS[command])]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == f"jaxalign {command}: small: cannot be written: Not a directory; set --output"


def test_a_folder_in_place_of_a_file_is_named(folder, capsys):
    for command in ("generate", "filter", "plan"):
        assert main([command, *(one.format("run") for one in COMMANDS[command])]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"jaxalign {command}: run: cannot be written: Is a directory; set ")
