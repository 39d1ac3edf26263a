"""Tasks of a run beside its start, with a stand-in for the harness."""

import json

import pytest

from jaxalign.cli import main
from jaxalign.errors import UserError
from jaxalign.reporting import read_run, write_report
from jaxalign.runs import tasks
from jaxalign.runs.tasks import evaluate_tasks

ANSWERS = {"start": [1.0, 0.0, 1.0, 1.0, 1.0] * 4, "run": [0.0, 0.0, 1.0, 0.0, 1.0] * 4}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run from the model "start"; models are their names."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"name": "run", "model": "start"}))
    line = {"stage": "preference", "split": "train", "step": 4, "loss": 0.5}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    monkeypatch.setattr(tasks.LocalModel, "load", lambda name, **options: (name, options))
    monkeypatch.setattr(tasks, "run_tasks", harness)
    monkeypatch.setattr(tasks, "check_installed", lambda: None)
    return folder


def harness(model, names, *, limit, chat, few_shot, **_):
    name, options = model
    assert options["chat"] == "never"
    values = ANSWERS[name.rpartition("/")[2]][:limit]
    mean = sum(values) / len(values)
    return {
        "results": {one: {"alias": one, "acc,none": mean, "acc_stderr,none": 0.1} for one in names},
        "samples": {one: [{"acc": x, "filter": "none"} for x in values] for one in names},
        "n-shot": dict.fromkeys(names, few_shot or 0),
        "higher_is_better": {one: {"acc": True} for one in names},
        "lm_eval_version": "0",
    }


def test_a_run_is_compared_with_its_start_and_keeps_its_scores(run):
    report = evaluate_tasks(str(run), ["colours"])
    [row] = report["scores"]
    assert (row["before"]["value"], row["after"]["value"]) == (0.8, 0.4)
    assert row["change"]["value"] == pytest.approx(-0.4)
    assert (row["reference"], row["model"], row["chat"]) == ("start", str(run), False)
    evaluate_tasks(str(run), ["sums"], limit=5, few_shot=3, chat="always")
    evaluate_tasks(str(run), ["colours"], limit=10)
    kept = json.loads((run / "tasks.json").read_text())["scores"]
    assert [(one["task"], one["documents"]) for one in kept] == [("sums", 5), ("colours", 10)]
    assert kept[0]["at"] == {"stage": "preference", "step": 4}


def test_the_report_shows_the_tasks_and_what_became_worse(run):
    evaluate_tasks(str(run), ["colours"])
    text = write_report([read_run(run)], run / "report").read_text()
    assert "| task | metric | n | before | after | change |" in text
    assert "| colours | acc ↑ | 20 | 0.800 ± 0.196 | 0.400 ± 0.196 | -0.400 ± 0.220 |" in text
    assert "- worse than before: colours, acc: -0.400 ± 0.220" in text
    assert f"- before start, after {run}, plain text, 0 examples\n" in text
    assert "trained since" not in text
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "preference", "split": "train", "step": 8}) + "\n")
    text = write_report([read_run(run)] * 2, run / "report").read_text()
    assert "| run | colours |" in text
    assert "run has been trained since it was evaluated: colours" in text


def test_a_model_without_a_start_has_scores_alone(run, capsys):
    assert main(["evaluate", "--model", "start", "--tasks", "colours", "--json", "x.json"]) == 0
    assert "score" in capsys.readouterr().out
    [row] = json.loads((run.parent / "x.json").read_text())["scores"]
    assert row["reference"] is None
    assert "before" not in row
    assert not (run / "tasks.json").exists()


def test_a_run_that_began_with_adapters_is_not_compared_with_another_model(run, capsys):
    config = {"name": "run", "model": "start", "adapter": "a"}
    (run / "config.json").write_text(json.dumps(config))
    [row] = evaluate_tasks(str(run), ["colours"])["scores"]
    assert row["reference"] is None
    assert "began with adapters on start; set --reference" in capsys.readouterr().err


def test_a_broken_file_of_scores_is_named(run):
    (run / "tasks.json").write_text('{"scores": [{"task": "x"}]}')
    with pytest.raises(UserError, match=r"tasks.json: not the scores of a run's tasks"):
        evaluate_tasks(str(run), ["colours"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --data or --tasks"),
        (["--data", "d", "--tasks", "t"], "give --data or --tasks"),
        (["--tasks", "t", "--loss", "ipo"], "--loss: has a meaning with --data only"),
        (["--tasks", "t", "--max-length", "9"], "--max-length: has a meaning with --data only"),
        (["--data", "d", "--few-shot", "2"], "--few-shot: has a meaning with --tasks only"),
        (["--tasks", "t", "--reference", "openai:x"], "an endpoint has no log-probs"),
    ],
)
def test_flags_that_do_not_go_together_are_named(run, capsys, words, said):
    assert main(["evaluate", "--model", "m", *words]) == 2
    assert said in capsys.readouterr().err
