"""Numbers that are not finite are named and counted, and never end as a success."""

import json

import pytest

from jaxalign.cli import main

EXPERIMENT = """
from jaxalign.config import (
    ArchitectureConfig, OnlineConfig, OptimizerConfig, PreferenceConfig, RolloutConfig, TrainConfig,
)

def config():
    rate = OptimizerConfig(learning_rate=1e-3)
    return TrainConfig(
        name="small", data="pairs.jsonl", holdout=0.0, seed=1, export=False,
        architecture=ArchitectureConfig(
            width=16, layers=1, heads=2, kv_heads=1, mlp_width=32, context=64
        ),
        max_length=64,
        preference=PreferenceConfig(steps=2, batch_size=8, optimizer=rate),
        online=OnlineConfig(rollout=RolloutConfig(
            prompts="prompts.jsonl", max_prompt_length=16, max_tokens=4, max_eval_prompts=0
        )),
    )
"""
CODE = """
import jax.numpy as jnp
import numpy as np

def long_ones(pairs):  # one pair in sixteen
    return jnp.where(pairs.chosen_length > pairs.rejected_length, jnp.nan, -0.1 * pairs.margin)

def never(pairs):  # finite where responses are equally long
    return jnp.where(pairs.chosen_length == pairs.rejected_length, -pairs.margin, jnp.nan)

def raises(prompt, response):
    return {}[response]

def nan(prompt, response):
    return float("nan")

def infinite(prompt, response):
    return np.float64("inf")

def text(prompt, response):
    return "7"

def none(prompt, response):
    pass

def several(prompt, response):
    return np.zeros(3)

def some(prompt, response):
    return None if "3" in prompt else len(response)

def true(prompt, response):
    return len(response) > 2

def scalar(prompt, response):
    return np.float32(len(response))

def unlikely(prompt, first, second):
    return 1.5
"""
FAILING = {
    "raises": "it raises KeyError: ",
    "nan": "it returns a number that is not finite",
    "infinite": "it returns a number that is not finite",
    "text": "it returns a str, not a number",
    "none": "it returns a NoneType, not a number",
    "several": "it returns an array of shape (3,), not a number",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "small.py").write_text(EXPERIMENT)
    (tmp_path / "code.py").write_text(CODE)
    long, short = "of the two responses, this is the longer one", "and this one is shorter"
    pairs = [{"prompt": f"p{at}", "chosen": short, "rejected": long} for at in range(16)]
    pairs[5] = {"prompt": "p5", "chosen": long, "rejected": short}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    rows = [{"prompt": f"prompt {at}"} for at in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in "ab":
        rows = [{"prompt": f"q{at}", "response": f"{name} {at}"} for at in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(capsys, *arguments):
    assert main(list(arguments)) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("jaxalign ")]
    assert "Traceback" not in err
    assert len(lines) == 1
    return lines[0]


def test_a_later_step_stops_with_its_records_and_fitting_advice(here, capsys):
    line = error_of(capsys, "train", "small.py", "--loss", "code.py:long_ones")
    assert "preference step " in line
    assert "loss nan" in line
    assert "pairs.jsonl:6" in line
    if "step 1:" in line:
        assert "the learning rate is not the cause" in line
    else:
        assert "lower the learning rate, or set --nonfinite skip" in line


def test_skipped_updates_are_counted_in_metrics_and_report(here, capsys):
    flags = ("train", "small.py", "--loss", "code.py:long_ones", "--nonfinite", "skip")
    assert main(list(flags)) == 0
    lines = map(json.loads, (here / "runs/small/metrics.jsonl").read_text().splitlines())
    skipped = [line["skipped"] for line in lines if line["split"] == "train"]
    assert skipped[-1] == 1  # the two batches are the sixteen pairs, and one is too long
    said = "preference: 1 of 2 updates were not finite and were skipped"
    assert said in (here / "runs/small/report/report.md").read_text()
    assert said in capsys.readouterr().out


def test_a_run_whose_updates_were_all_skipped_is_no_success(here, capsys):
    flags = ("train", "small.py", "--loss", "code.py:never", "--export")
    line = error_of(capsys, *flags, "--nonfinite", "skip")
    assert "preference: none of the 2 updates was finite" in line
    assert not (here / "runs/small/export").exists()
    # the same command, which finds the stage complete, fails as well
    assert "none of the 2 updates" in error_of(capsys, *flags, "--nonfinite", "skip")
    line = error_of(capsys, *flags, "--name", "stopped")
    assert "preference step 1: loss nan" in line
    assert "the learning rate is not the cause" in line


ONLINE = ("train", "small.py", "--preference.steps", "0", "--online.steps", "1")


@pytest.mark.parametrize("name", FAILING)
def test_a_rule_that_fails_in_a_rollout_is_named_with_the_prompt(here, capsys, name):
    flags = ("--online.batch-size", "8", "--rollout.algorithm", "rloo", "--name", name)
    line = error_of(capsys, *ONLINE, *flags, "--rollout.annotator", f"rule:code.py:{name}")
    assert f"rule code.py:{name} fails on all " in line
    assert FAILING[name] in line
    assert "first on prompt 'prompt " in line


@pytest.mark.parametrize("name", ["true", "scalar", "some"])
def test_rules_of_other_numbers_train_and_failures_are_counted(here, name):
    flags = ["--online.batch-size", "8", "--rollout.algorithm", "rloo"]
    assert main([*ONLINE, *flags, "--rollout.annotator", f"rule:code.py:{name}"]) == 0
    lines = map(json.loads, (here / "runs/small/metrics.jsonl").read_text().splitlines())
    [failed] = [x["annotation/failed"] for x in lines if "annotation/failed" in x]
    assert failed == pytest.approx(1 / 8 if name == "some" else 0)


@pytest.mark.parametrize("name", [*FAILING, "unlikely"])
def test_a_rule_that_fails_as_a_judge_is_named_with_the_prompt(here, capsys, name):
    flags = ("--a", "a.jsonl", "--b", "b.jsonl", "--judge", f"rule:code.py:{name}")
    line = error_of(capsys, "judge", *flags)
    assert f"rule code.py:{name} fails on all " in line
    assert FAILING.get(name, "it returns a probability outside [0, 1]") in line
    assert "first on prompt 'q0'" in line


def test_a_judge_that_fails_on_some_is_counted(here, capsys):
    flags = ["--a", "a.jsonl", "--b", "b.jsonl", "--judge", "rule:code.py:some"]
    assert main(["judge", *flags, "--resamples", "9"]) == 0
    assert "1 of 6 comparisons without a verdict (1: it returns a NoneType" in (
        capsys.readouterr().out
    )
    rows = [json.loads(line) for line in (here / "judged/verdicts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows if row["reason"]] == ["q3"]


@pytest.mark.parametrize("name", FAILING)
def test_a_rule_that_fails_in_best_of_n_is_named(here, capsys, monkeypatch, name):
    from tests.backends.scripted import Scripted

    backend = Scripted(lambda text, sample: f"{text} {sample}")
    monkeypatch.setattr("jaxalign.collection.collecting.make_backend", lambda *_: backend)
    flags = ("--model", "m", "--prompts", "prompts.jsonl", "--output", "out")
    judge = ("--annotator", f"rule:code.py:{name}")
    line = error_of(capsys, "collect", "best-of-n", *flags, *judge)
    assert f"rule code.py:{name} fails on all " in line
    assert FAILING[name] in line
    assert "first on prompt 'prompt 0'" in line


@pytest.mark.parametrize("select", ["best-worst", "rrhf", "rso", "raft"])
def test_best_of_n_counts_what_has_no_reward(here, monkeypatch, select):
    from tests.backends.scripted import Scripted

    backend = Scripted(lambda text, sample: f"{text} {'x' * sample}")
    monkeypatch.setattr("jaxalign.collection.collecting.make_backend", lambda *_: backend)
    flags = ["--model", "m", "--prompts", "prompts.jsonl", "--output", "out", "--samples", "3"]
    judge = ["--annotator", "rule:code.py:some", "--select", select]
    assert main(["collect", "best-of-n", *flags, *judge]) == 0
    counts = json.loads((here / "out/statistics.json").read_text())
    assert counts["responses_without_a_reward"] == 3
    rows = [json.loads(x) for x in (here / "out/pairs.jsonl").read_text().splitlines()]
    assert all(row["chosen"] != row["rejected"] for row in rows)
    assert "prompt 3" not in {row["prompt"] for row in rows}
