"""The lm-evaluation-harness itself on local tasks: what it says with its Hugging Face model."""

import json
import sys

import numpy as np
import pytest

from jaxalign.backends.local import LocalModel
from jaxalign.cli import main
from jaxalign.errors import UserError
from jaxalign.evaluation.harness import run_tasks
from tests.evaluation.local_tasks import FIXTURE, RUNS, TASKS, VARIANTS, write_model, write_tasks

EXPECTED = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))
OPTIONS = {"num_fewshot": "few_shot", "apply_chat_template": "chat"}
"""The harness's name of an option -> its name in `run_tasks`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    write_tasks(folder / "tasks")
    for variant in VARIANTS:
        write_model(folder / variant, variant)
    return folder


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """The harness, without a network and with a cache of its own; skips where it is missing."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


CASES = [
    pytest.param(
        variant, run, marks=[] if (variant, run) == ("begun", "zero") else pytest.mark.slow
    )
    for variant in VARIANTS
    for run in RUNS
]


@pytest.mark.parametrize(("variant", "run"), CASES)
def test_results_are_those_of_transformers(folder, harness, variant, run):
    model = LocalModel.load(folder / variant, batch_size=4, chat="never")
    expected = EXPECTED[variant]["tasks"][run]
    options = {OPTIONS[name]: value for name, value in RUNS[run].items() if name in OPTIONS}
    names = list(expected["scores"])
    found = run_tasks(model, names, folder=folder / "tasks", **options)
    for task, scores in expected["scores"].items():
        own = found["results"][task]
        for key, value in scores.items():
            if value == "N/A":
                assert own[key] == value
            else:
                assert own[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (task, key)
        for sample, document in zip(
            found["samples"][task], expected["documents"][task], strict=True
        ):
            own = json.loads(json.dumps({name: sample[name] for name in document}))
            if task == "sums":
                assert own == document
            else:
                assert own["arguments"] == document["arguments"]
                np.testing.assert_allclose(
                    flat(own["filtered_resps"]), flat(document["filtered_resps"]), atol=1e-4
                )


def flat(values):
    """The numbers in nested lists."""
    return [x for one in values for x in flat(one)] if isinstance(values, list) else [values]


def test_the_command_prints_scores_and_writes_them(folder, harness, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    words = ["evaluate", "--model", str(folder / "begun"), "--reference", str(folder / "plain")]
    words += ["--tasks", "col*", "--tasks-folder", str(folder / "tasks"), "--limit", "3"]
    assert main([*words, "--json", str(folder / "scores.json")]) == 0
    report = json.loads((folder / "scores.json").read_text())
    accuracy = next(row for row in report["scores"] if row["metric"] == "acc")
    assert (accuracy["task"], accuracy["documents"], accuracy["limit"]) == ("colours", 3, 3)
    assert set(accuracy["change"]) == {"value", "half_width"}
    assert {"task", "before", "after", "change"} <= set(capsys.readouterr().out.split())


def test_what_is_wrong_with_a_task_takes_one_line(folder, harness, tmp_path):
    from jaxalign.evaluation.harness_classes import TaskLoader

    loader = TaskLoader(include_path=str(folder / "tasks"), include_defaults=False)
    with pytest.raises(UserError, match="there is no task 'nothing'"):
        loader.names(["sums", "nothing"])
    write_tasks(tmp_path / "tasks")
    (tmp_path / "tasks" / "sums.jsonl").unlink()
    with pytest.raises(UserError, match="tasks: sums: cannot be loaded: "):
        run_tasks(LocalModel.load(folder / "begun"), ["sums"], folder=tmp_path / "tasks")


def test_a_missing_harness_is_named(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    model = LocalModel.load(folder / "begun", chat="never")
    with pytest.raises(UserError, match=r'pip install "jaxalign\[lm-eval\]"'):
        run_tasks(model, list(TASKS))
