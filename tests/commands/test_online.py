"""`jaxalign train` with an online stage: one command, resumable, and clear about what is wrong."""

import json
import os
import signal
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from jaxalign.cli import main
from jaxalign.config import from_json, to_json
from jaxalign.models import load_pretrained
from jaxalign.online.sampler import Sampler

EXPERIMENT = """
from jaxalign.config import (
    ArchitectureConfig, OnlineConfig, OptimizerConfig, RolloutConfig, TrainConfig,
)

def config():
    return TrainConfig(
        architecture=ArchitectureConfig(
            width=32, layers=1, heads=2, kv_heads=2, mlp_width=64, context=64
        ),
        online=OnlineConfig(
            steps=6, batch_size=8, eval_every=3, save_every=2,
            optimizer=OptimizerConfig(learning_rate=1e-3, b1=0.0),
            rollout=RolloutConfig(
                options={"tau": 0.1}, prompts="prompts.jsonl", annotator="rule:rules.py:short",
                max_prompt_length=40, max_tokens=12, max_eval_prompts=8,
            ),
        ),
    )
"""
RULES = """
import os

def short(prompt, response):
    if os.path.exists("armed"):
        with open("calls", "a") as file:
            file.write(".")
        if os.path.getsize("calls") > 100:
            os.remove("armed")
            raise KeyboardInterrupt
    return -len(response)

def silent(prompt, response):
    return None

def choosy(prompt, response):
    return None if "7" in prompt else -len(response)

def compared(prompt, first, second):
    return 0.25 if len(first) > len(second) else 0.75

def brief(prompts, responses, number):
    return [short(*pair) + 0 * int(x) for *pair, x in zip(prompts, responses, number)]

def nought(prompts, responses):
    return 0

def spaced(prompts, responses):
    return [" " in response for response in responses]
"""
CHANGES = ("tokens_per_second", "mfu", "time/", "rollout/tokens_per_second")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with an experiment, prompts and rules."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    (tmp_path / "rules.py").write_text(RULES)
    prompts = [f"What colour is {thing}?" for thing in ("snow", "coal", "grass", "a plum")]
    prompts += [f"Say {number} words." for number in range(40)]
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def train(*flags):
    return main(["train", "experiment.py", *flags])


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(CHANGES)} for line in lines]


def test_one_command_samples_learns_evaluates_exports_and_reports(here, capsys):
    assert train() == 0
    folder = here / "runs" / "run"
    lines = metrics(folder)
    assert [x["step"] for x in lines if x["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    held_out = [x for x in lines if x["split"] == "eval"]
    assert [x["step"] for x in held_out] == [0, 3, 6]
    assert held_out[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert held_out[-1]["kl"] != 0
    kept = [json.loads(x) for x in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert [x["step"] for x in kept] == [step for step in range(1, 7) for _ in range(4)]
    assert all(len(x["responses"]) == 2 for x in kept)
    for line in kept:
        first, second = map(len, line["responses"])
        assert line["preference"][0][1] == 0.5 + 0.5 * np.sign(second - first)
    report = (folder / "report" / "report.md").read_text()
    assert "win rate against the reference" in report
    assert "Samples of run" in report
    assert "win rate against the reference" in capsys.readouterr().out
    moved = load_pretrained(folder / "export").params["embed"]["embedding"]
    assert np.isfinite(np.asarray(moved)).all()
    counted = json.loads((folder / "data.json").read_text())
    assert counted["train_prompts"]["records"] + counted["held_out_prompts"]["records"] <= 44


def test_what_has_no_verdict_is_counted_and_reported(here, capsys):
    flags = ("--rollout.annotator", "rule:rules.py:choosy", "--rollout.max-eval-prompts", "0")
    assert train(*flags) == 0
    lines = metrics(here / "runs" / "run")
    failed = [line["annotation/failed"] for line in lines]
    assert 0 < np.mean(failed) < 0.5
    kept = [json.loads(x) for x in (here / "runs/run/rollouts.jsonl").read_text().splitlines()]
    for line in kept:
        said = line["preference"][0][1]
        assert (said is None) == ("7" in line["prompt"])
        assert line.get("reason", "") == (
            "it returns a NoneType, not a number" if said is None else ""
        )
    printed = capsys.readouterr().out
    assert "training prompts without a verdict" in printed
    assert f"{np.mean(failed):.3f}" in printed


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(here):
    assert train("--name", "whole") == 0
    (here / "armed").touch()
    assert train("--name", "broken") == 130
    assert not (here / "runs" / "broken" / "report").exists()
    assert train("--name", "broken") == 0
    whole, broken = here / "runs" / "whole", here / "runs" / "broken"
    assert metrics(whole) == metrics(broken)
    assert (whole / "rollouts.jsonl").read_text() == (broken / "rollouts.jsonl").read_text()


def test_reward_functions_are_logged_one_by_one_and_a_run_resumes(here, capsys):
    lines = [{"prompt": f"Say {at} words.", "number": str(at)} for at in range(40)]
    (here / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--rollout.annotator", "None", "--rollout.reward", "rules.py:brief")
    flags += ("rules.py:spaced:0.5", "--lora.rank", "2", "--online.micro-batches", "2")
    flags += ("--rollout.algorithm", "dapo", "--rollout.options", "samples", "2", "updates", "2")
    flags += ("--rollout.top-p", "0.9")
    assert train(*flags, "--name", "whole") == 0
    assert "top_p 0.9: samples are from a truncated distribution" in capsys.readouterr().out
    (here / "armed").touch()
    assert train(*flags, "--name", "broken") == 130
    assert train(*flags, "--name", "broken") == 0
    whole, broken = here / "runs" / "whole", here / "runs" / "broken"
    assert metrics(whole) == metrics(broken)
    kept = (whole / "rollouts.jsonl").read_text()
    assert kept == (broken / "rollouts.jsonl").read_text()
    for line in map(json.loads, kept.splitlines()):
        parts = line["rewards"]
        assert parts["brief"] == [-len(text) for text in line["responses"]]
        total = np.add(parts["brief"], np.multiply(0.5, parts["spaced"]))
        np.testing.assert_allclose(line["reward"], total)
    for line in metrics(whole):
        assert {"reward/brief", "reward/spaced"} <= set(line)
    [last] = [x for x in metrics(whole) if x["split"] == "eval" and x["step"] == 6]
    assert 0 <= last["win_rate"] <= 1


@pytest.fixture
def judge():
    """A judge behind an endpoint that can be down: its questions, and what it says of each."""
    asked, down = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if down and len(asked) >= down[0]:
                self.close_connection = True
                return  # and no reply
            question = body["messages"][0]["content"]
            asked.append(question)
            verdict = "AB"[zlib.crc32(question.encode()) % 2]
            data = json.dumps({"choices": [{"message": {"content": verdict}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    here = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=here.serve_forever, args=(0.01,), daemon=True).start()
    yield f"openai:http://127.0.0.1:{here.server_address[1]}#judge", asked, down
    here.shutdown()
    here.server_close()


def test_a_judge_that_goes_down_is_asked_for_the_rest_and_nothing_twice(here, judge, capsys):
    address, asked, down = judge
    flags = ("--rollout.annotator", address, "--rollout.judge.attempts", "1")
    flags += ("--rollout.judge.workers", "2", "--online.steps", "3", "--online.save-every", "0")
    assert train(*flags, "--name", "whole") == 0
    whole = sorted(asked)
    assert len(set(whole)) == len(whole)
    asked.clear()
    down.append(len(whole) // 2)
    assert train(*flags, "--name", "broken") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot be reached" in error
    assert "run the same command again to resume" in error
    kept = (here / "runs" / "broken" / "rollouts.jsonl").read_text().splitlines()
    assert "cannot be reached" in json.loads(kept[-1])["reason"]
    paid = len(asked)
    assert paid == len(whole) // 2
    down.clear()
    assert train(*flags, "--name", "broken") == 0
    assert sorted(asked) == whole
    assert metrics(here / "runs" / "whole") == metrics(here / "runs" / "broken")
    files = [here / "runs" / name / "rollouts.jsonl" for name in ("whole", "broken")]
    assert files[0].read_text() == files[1].read_text()


def test_sigterm_while_sampling_saves_and_asks_nobody(here, monkeypatch, capsys):
    flags = ("--online.save-every", "0", "--online.eval-every", "0", "--online.steps", "4")
    assert train(*flags, "--name", "whole") == 0
    sampled, called = Sampler.__call__, []

    def sample(self, *arguments, **options):
        called.append(signal.SIGTERM)
        if len(called) == 4:  # in a later step than the first
            os.kill(os.getpid(), signal.SIGTERM)
        return sampled(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "__call__", sample)
        assert train(*flags, "--name", "broken") == 143
    said = capsys.readouterr().err.strip().splitlines()[-1]
    step = metrics(here / "runs/broken")[-1]["step"]
    assert 0 < step < 4
    assert f"online: stopped by SIGTERM at step {step}; it is saved" in said
    assert train(*flags, "--name", "broken") == 0
    assert metrics(here / "runs/broken") == metrics(here / "runs/whole")


def test_adapters_learn_online_and_a_comparing_rule_judges(here):
    flags = ("--lora.rank", "2", "--rollout.annotator", "rule:rules.py:compared")
    assert (
        train(*flags, "--rollout.algorithm", "nash_md_pg", "--rollout.options", "tau", "0.1") == 0
    )
    assert (here / "runs" / "run" / "adapter" / "adapter_config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--lora.rank", "2")])
def test_sampling_on_another_mesh_changes_nothing(here, flags):
    assert train("--name", "same", *flags) == 0
    assert train("--name", "other", *flags, "--rollout.mesh", "data", "4", "tensor", "2") == 0
    first, second = (metrics(here / "runs" / name)[1:3] for name in ("same", "other"))
    for one, other in zip(first, second, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_config_with_rollouts_round_trips(here):
    assert (
        train("--rollout.stop", "x", "y", "--rollout.mesh", "tensor", "2", "--online.steps", "1")
        == 0
    )
    text = (here / "runs" / "run" / "config.json").read_text()
    config = from_json(text)
    assert config.online.rollout.stop == ("x", "y")
    assert config.online.rollout.options == {"tau": 0.1}
    assert json.loads(to_json(config)) == json.loads(text)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--rollout.algorithm", "ppp"), "rollout.algorithm: 'ppp' is neither"),
        (("--rollout.options", "gamma", "1"), "ipo_md has no gamma; it has tau, beta, samples"),
        (("--rollout.options", "beta", "2"), "beta: 2.0 is not in [0, 1]"),
        (("--rollout.annotator", "None"), "rollout.annotator: missing"),
        (("--rollout.annotator", "oracle:x"), "'oracle:x' is none of"),
        (("--rollout.annotator", "rule:rules.py:nobody"), "has no function nobody"),
        (("--rollout.annotator", "rule:rules.py:silent"), "fails on all"),
        (
            ("--rollout.algorithm", "rloo", "--rollout.annotator", "rule:rules.py:compared"),
            "compares responses and gives no rewards",
        ),
        (("--rollout.reward", "rules.py:spaced"), "rollout.reward: an annotator is set, too"),
        (
            ("--rollout.annotator", "None", "--rollout.reward", "rules.py:brief"),
            "prompts.jsonl:1: no field number, which rollout.reward rules.py:brief reads",
        ),
        (
            ("--rollout.annotator", "None", "--rollout.reward", "rules.py:nought"),
            "rollout.reward: rules.py:nought returned a int, not a list of numbers",
        ),
        (("--rollout.max-tokens", "40"), "more than the model's context of 64"),
        (("--rollout.max-tokens", "0"), "rollout.max_tokens: 0 is not in [1, inf)"),
        (("--rollout.temperature", "0"), "rollout.temperature: 0.0 is not in (0, inf)"),
        (("--rollout.prompts", "empty.jsonl"), "empty.jsonl:2"),
        (("--rollout.judge.timeout", "0"), "rollout.judge.timeout: 0.0 is not in (0, inf)"),
        (("--rollout.mesh", "rows", "2"), "rollout.mesh: no axis rows"),
        (("--online.batch-size", "3"), "online.batch_size: 3 is not a multiple"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(here, capsys, flags, said):
    (here / "empty.jsonl").write_text('{"prompt": "a"}\n{"prompt": " "}\n')
    assert train(*flags) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1
