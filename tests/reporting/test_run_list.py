"""Runs below a folder: how far each is, and folders that are broken or something else."""

import json
import os

import pytest

from jaxalign.cli import main
from jaxalign.errors import UserError
from jaxalign.files import locked
from jaxalign.reporting.run_list import list_runs

STAGE = {"steps": 4, "epochs": 0.0, "batch_size": 8}


def write_run(folder, *steps, preference=STAGE, report=False, age=0):
    """A run folder by hand: its metrics have these steps."""
    folder.mkdir(parents=True)
    config = {"name": folder.name, "sft": {"steps": 0, "epochs": 0.0}, "preference": preference}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "data.json").write_text(json.dumps({"train_pairs": {"records": 33}}))
    held_out = {"rewards/accuracies": 0.75, "rewards/margins": 1.5, "loss": 0.5}
    lines = [{"split": "train", "step": step, "loss": 2.0} for step in steps]
    lines += [{"split": "eval", "step": step} | held_out for step in steps[-1:]]
    lines = [{"stage": "preference"} | line for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(folder / "metrics.jsonl", (1e9 - age, 1e9 - age))
    if report:
        (folder / "report").mkdir()
        (folder / "report" / "report.md").touch()


def test_states_steps_and_the_newest_first(tmp_path):
    write_run(tmp_path / "done", 1, 2, 3, 4, report=True, age=30)
    write_run(tmp_path / "half", 1, 2, report=True, age=10)  # reported before it was complete
    write_run(tmp_path / "nested" / "cut", 1, 2, 3, 4, age=20)  # before its report
    write_run(tmp_path / "none", age=40)
    (tmp_path / "none" / "metrics.jsonl").unlink()
    os.utime(tmp_path / "none" / "config.json", (1, 1))
    with locked(tmp_path / "half", "--name", folder=True):
        running = {one.name: one.state for one in list_runs(tmp_path)}
    runs = list_runs(tmp_path)
    assert [(one.name, one.state) for one in runs] == [
        ("half", "stopped"),
        ("nested/cut", "stopped"),
        ("done", "finished"),
        ("none", "failed before its first step"),
    ]
    assert running == {one.name: one.state for one in runs} | {"half": "running"}
    assert (runs[0].step, runs[0].steps, runs[3].step) == (2, 4, 0)
    assert (runs[0].loss, runs[0].accuracy, runs[0].margin) == (2.0, 0.75, 1.5)
    (one,) = list_runs(tmp_path / "done")
    assert one.state == "finished"


def test_epochs_are_counted_in_steps_by_the_run(tmp_path):
    epochs = STAGE | {"steps": 0, "epochs": 2.0}
    write_run(tmp_path / "a", 1, preference=epochs)
    assert list_runs(tmp_path)[0].steps is None
    (tmp_path / "a" / "steps.json").write_text('{"preference": 9}')
    assert list_runs(tmp_path)[0].steps == 9


def test_a_lock_is_left_as_it_is(tmp_path):
    write_run(tmp_path / "a", 1)
    with locked(tmp_path / "a", "--name", folder=True):
        list_runs(tmp_path)
        with (
            pytest.raises(UserError, match="is writing it"),
            locked(tmp_path / "a", "", folder=True),
        ):
            pass
    with locked(tmp_path / "a", "--name", folder=True):
        pass


def test_broken_and_foreign_folders_are_a_line_each(tmp_path, capsys):
    write_run(tmp_path / "whole", 1, 2, 3, 4, report=True)
    for name, file, text in (
        ("list", "config.json", "[1]"),
        ("cut", "config.json", '{"name"'),
        ("model", "config.json", '{"model_type": "llama"}'),
        ("stages", "config.json", '{"name": 3, "preference": {"steps": "many"}}'),
        ("metrics", "metrics.jsonl", '{"stage": "preference"}\n'),
        ("counts", "steps.json", '{"preference": "many"}'),
        ("folder", "metrics.jsonl", None),
        ("empty", "notes.txt", ""),
    ):
        if name in ("metrics", "counts"):
            write_run(tmp_path / name, 1, preference=STAGE | {"steps": 0, "epochs": 1.0})
        else:
            (tmp_path / name).mkdir()
        if text is None:
            (tmp_path / name / "config.json").write_text("{}")
            (tmp_path / name / file).mkdir()
        else:
            (tmp_path / name / file).write_text(text)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert main(["runs", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for line in (
        "cut: broken:",
        "list: broken:",
        "model: not a run: its config.json names no stage",
        "stages: not a run: its config.json names no stage",
        "folder: broken:",
        "empty: not a run: no config.json",
        "loop: not a run: no config.json",
    ):
        assert printed.out.count(f"{tmp_path}/{line}") == 1
    assert "1 lines that cannot be read" in printed.out
    assert "whole" in printed.out


def test_json_has_every_run_and_no_number_that_json_lacks(tmp_path, capsys):
    write_run(tmp_path / "a", 1)
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "preference", "split": "train", "step": 2, "loss": NaN}\n')
    (tmp_path / "other").mkdir()
    assert main(["runs", str(tmp_path), "--json"]) == 0
    runs = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [run["name"] for run in runs] == ["a", "other"]
    assert (runs[0]["step"], runs[0]["loss"], runs[0]["accuracy"]) == (2, None, 0.75)


def test_no_runs_and_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 2
    assert "runs: no such folder" in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == "runs: no runs\n"
