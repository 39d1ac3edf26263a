"""A run folder is one command's, of one config and of one set of inputs; its files are checked."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxalign.cli import main
from jaxalign.config import (
    OnlineConfig,
    PreferenceConfig,
    PretrainingConfig,
    RolloutConfig,
    SupervisedConfig,
    TrainConfig,
)
from jaxalign.errors import OutputError, UserError
from jaxalign.reporting import read_run
from jaxalign.runs import train
from jaxalign.runs.folder import run_folder
from jaxalign.runs.inputs import check_examples, example_digests, input_digests
from tests.tiny_model import save_tiny_model

EXPERIMENT = """
from jaxalign.config import OptimizerConfig, PreferenceConfig, TrainConfig

def config():
    rate = OptimizerConfig(learning_rate=1e-3)
    stage = PreferenceConfig(
        steps=3, batch_size=8, optimizer=rate, save_every=1, reference="precomputed"
    )
    return TrainConfig(
        name="small", model="./model", data="pairs.jsonl", max_length=64, holdout=0.2,
        preference=stage,
    )
"""
TOKENS = {"eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 5, "temperature": 0.25}
TIMES = ("tokens_per_second", "mfu")


def write_pairs(path, rows=range(20)):
    pairs = [{"prompt": f"{n}?", "chosen": f"yes {n}", "rejected": f"no {n} no"} for n in rows]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with an experiment, its inputs and its finished run."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.py").write_text(EXPERIMENT)
    write_pairs(folder / "pairs.jsonl")
    save_tiny_model(folder / "model")
    fields = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps(fields | TOKENS))
    (folder / "model/generation_config.json").write_text('{"eos_token_id": [3, 7]}')
    here = Path.cwd()
    try:
        os.chdir(folder)
        assert main(["train", "small.py"]) == 0
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of it, in which commands run."""
    copy = shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(copy)
    return copy


def complaint(capsys, *arguments, status=2):
    """The last line of a command that fails; there is no traceback."""
    capsys.readouterr()
    assert main(list(arguments)) == status
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return err.strip().splitlines()[-1]


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


# ------------------------------------------------------------------------------ the folder itself


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("", "names no folder"),
        (".", "names no folder"),
        ("./", "names no folder"),
        ("..", "leaves the output folder"),
        ("../x", "leaves the output folder"),
        ("a/../../x", "leaves the output folder"),
        ("/tmp/x", "leaves the output folder"),
        ("a\0b", "has a NUL character"),
        ("x" * 256, "has more than 255 bytes"),
        ("ü" * 128, "has more than 255 bytes"),
    ],
)
def test_names_that_leave_the_output_folder_are_refused(tmp_path, name, fault):
    config = TrainConfig(name=name, output=str(tmp_path / "runs"))
    with pytest.raises(UserError) as found, run_folder(config):
        pass
    assert str(found.value) == f"name: {name[:80]!r} {fault}; set --name to a plain name"
    assert list(tmp_path.iterdir()) == []


def test_a_second_command_is_refused_while_the_first_one_runs(tmp_path):
    config = TrainConfig(name="a", output=str(tmp_path))
    with run_folder(config):
        with pytest.raises(UserError, match=f"{tmp_path}/a: process {os.getpid()} on .* is writ"):
            run_folder(config).__enter__()
        with run_folder(dataclasses.replace(config, name="b")):
            pass
    with run_folder(config):
        pass


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00\xff", b"[]", b"3", b"{}", b'{"name": "a", "model": "x", "data": "y", "seed": 0,'],
)
def test_a_broken_config_is_named(tmp_path, content):
    config = TrainConfig(name="a", output=str(tmp_path))
    with run_folder(config) as folder:
        pass
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError) as found, run_folder(config):
        pass
    assert str(found.value).startswith(f"{folder}/config.json: ")
    assert (folder / "config.json").read_bytes() == content


@pytest.mark.parametrize("change", [{"colour": 1}, {"mesh": 3}, {"preference": {"speed": 1}}])
def test_a_config_with_other_fields_is_named(tmp_path, change):
    config = TrainConfig(name="a", output=str(tmp_path))
    with run_folder(config) as folder:
        pass
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | change))
    with pytest.raises(UserError, match=f"{folder}/config.json: not the config of a run"):
        run_folder(config).__enter__()


def test_what_failed_before_its_first_step_is_replaced(tmp_path):
    config = TrainConfig(name="a", output=str(tmp_path), seed=1)
    with run_folder(config) as folder:
        (folder / "tokenizer").mkdir()
        (folder / "data.json").write_text("{}")
        (folder / "answers.jsonl").write_text("paid for")
        line = {"stage": "preference", "split": "eval", "step": 0, "loss": 1.0}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (folder / "checkpoints/preference/0.orbax-checkpoint-tmp").mkdir(parents=True)
    corrected = dataclasses.replace(config, seed=2)
    with run_folder(corrected):
        assert json.loads((folder / "config.json").read_text())["seed"] == 2
        assert not {"tokenizer", "data.json", "metrics.jsonl"} & set(os.listdir(folder))
        assert (folder / "answers.jsonl").read_text() == "paid for"
    (folder / "metrics.jsonl").write_text(json.dumps(line | {"step": 1}) + "\n")
    with pytest.raises(UserError, match="holds a run with different seed"):
        run_folder(config).__enter__()
    (folder / "metrics.jsonl").unlink()
    (folder / "checkpoints/preference/1").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a run with different seed"):
        run_folder(config).__enter__()
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: missing, but there are checkpoints"):
        run_folder(corrected).__enter__()


# ------------------------------------------------------------------------------ its inputs


def test_every_file_that_a_run_reads_is_among_its_inputs(folder):
    for name in ("e.jsonl", "s.jsonl", "t.txt", "u.txt", "p.jsonl", "q.jsonl", "loss.py", "ask.py"):
        (folder / name).write_text(name)
    (folder / "parts").mkdir()
    (folder / "parts" / "train.jsonl").write_text("{}")
    config = TrainConfig(
        model="./model",
        data="parts#train[:5]",
        eval_data="e.jsonl",
        pretrain=PretrainingConfig(steps=1, text=("t.txt",), eval_text=("u.txt",)),
        sft=SupervisedConfig(steps=1, data="s.jsonl"),
        preference=PreferenceConfig(steps=1, loss="loss.py:own"),
        online=OnlineConfig(
            steps=1,
            rollout=RolloutConfig(
                prompts="p.jsonl", eval_prompts="q.jsonl#[:9]", annotator="rule:ask.py:better"
            ),
        ),
    )
    found = {field: {Path(f).name for f in files} for field, files in input_digests(config).items()}
    model = {path.name for path in (folder / "model").iterdir()}
    assert found == {
        "data": {"train.jsonl"},
        "eval_data": {"e.jsonl"},
        "sft_data": {"s.jsonl"},
        "text": {"t.txt"},
        "eval_text": {"u.txt"},
        "model": model,
        "loss": {"loss.py"},
        "rollout.prompts": {"p.jsonl"},
        "rollout.eval_prompts": {"q.jsonl"},
        "rollout.annotator": {"ask.py"},
    }
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= model
    judged = RolloutConfig(annotator="reward:./model", algorithm="jaxalign.modules:find_module")
    found = input_digests(TrainConfig(online=OnlineConfig(steps=1, rollout=judged)))
    assert found.keys() == {"rollout.annotator", "rollout.algorithm"}
    assert len(found["rollout.annotator"]) == len(model)


@pytest.mark.parametrize(
    ("field", "file"),
    [
        ("data", "pairs.jsonl"),
        ("model", "model/model.safetensors"),
        ("model", "model/tokenizer.json"),
        ("model", "model/config.json"),
    ],
)
def test_a_changed_input_is_refused(folder, capsys, field, file):
    before = (folder / "runs/small/metrics.jsonl").read_bytes()
    content = bytearray((folder / file).read_bytes())
    content[-20] ^= 1  # one bit, the size stays
    (folder / file).write_bytes(content)
    line = complaint(capsys, "train", "small.py")
    assert line == (
        f"jaxalign train: {field}: {file} is not what the run began with; restore it, or set "
        "--name to start another run"
    )
    assert (folder / "runs/small/metrics.jsonl").read_bytes() == before
    (folder / file).unlink()
    if field == "data":
        line = complaint(capsys, "train", "small.py")
        assert line.startswith("jaxalign train: data: pairs.jsonl cannot be found")


def test_examples_that_differ_are_refused_whatever_they_came_from(folder, capsys):
    run = folder / "runs/small"
    kept = json.loads((run / "inputs.json").read_text())
    kept["examples"]["preference"] = "0" * 64  # as if a library tokenised in another way now
    (run / "inputs.json").write_text(json.dumps(kept))
    line = complaint(capsys, "train", "small.py")
    assert "runs/small: the examples of preference are not what the run began with" in line
    rows = [np.arange(3), ["a", None], 1.5]
    one, same, other = (
        example_digests({"sft": x})["sft"]
        for x in (rows, [np.arange(3), ["a", None], 1.5], [np.arange(3), ["a", ""], 1.5])
    )
    assert one == same != other
    (run / "inputs.json").write_text("[]")
    with pytest.raises(UserError, match=r"inputs\.json"):
        check_examples(run, {})


def test_a_folder_without_digests_is_taken_as_it_is_in_one_line(folder, capsys):
    run = folder / "runs/small"
    (run / "inputs.json").unlink()
    capsys.readouterr()
    assert main(["train", "small.py"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "digests" in line]
    assert len(lines) == 1
    assert lines[0].startswith(
        "jaxalign: runs/small: a run of a version before 0.2, without digests"
    )
    assert (run / "inputs.json").is_file()


def test_the_reference_table_is_recomputed_where_it_is_not_of_these_pairs(folder, capsys):
    path = folder / "runs/small/reference_log_probs.npz"
    with np.load(path) as stored:
        table, fingerprint = stored["log_probs"], stored["fingerprint"]
    other = np.asarray("0" * 64)
    for said, arrays in (
        ("computed from other data or weights", {"log_probs": table + 1, "fingerprint": other}),
        ("not the log-probs", {"log_probs": table[:3], "fingerprint": fingerprint}),
        ("not the log-probs", {"log_probs": table * np.nan, "fingerprint": fingerprint}),
        ("damaged", {"other": table}),
        ("has no fingerprint", {"log_probs": table}),
    ):
        np.savez(path, **arrays)
        capsys.readouterr()
        assert main(["train", "small.py", "--no-export"]) == 0
        assert said in capsys.readouterr().err
        with np.load(path) as stored:
            np.testing.assert_array_equal(stored["log_probs"], table)


# ------------------------------------------------------------------------------ its checkpoints


def test_a_damaged_checkpoint_is_named_and_the_run_ends_as_it_did(folder, capsys):
    run = folder / "runs/small"
    whole, weights = metrics(run), (run / "export/model.safetensors").read_bytes()
    parts = (run / "checkpoints/preference/3/state/ocdbt.process_0/d").iterdir()
    largest = max(parts, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    line = complaint(capsys, "train", "small.py", "--damaged-checkpoints", "stop")
    assert f"{largest.relative_to(folder)}: is not what was written" in line
    newest = ["convert", "runs/small", "converted"]
    assert "set another --step" in complaint(capsys, *newest, "--step", "3")
    capsys.readouterr()
    assert main(["report", "runs/small"]) == 0
    assert f"{largest.relative_to(folder)}: is not what was written" in capsys.readouterr().err
    assert main(newest) == 0
    assert "an older one is used" in capsys.readouterr().err
    assert main(["train", "small.py"]) == 0
    assert "an older one is used" in capsys.readouterr().err
    assert metrics(run) == whole
    assert (run / "export/model.safetensors").read_bytes() == weights


def test_a_bad_line_of_the_metrics_is_refused_and_reported(folder, capsys):
    path = folder / "runs/small/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "[1]\n", *lines[2:]]))
    before = path.read_bytes()
    assert "metrics.jsonl:3: a list, not an object" in complaint(capsys, "train", "small.py")
    assert path.read_bytes() == before
    assert main(["report", "runs/small"]) == 0
    assert "metrics.jsonl:3: a list" in capsys.readouterr().err
    assert "metrics.jsonl:3: a list" in (path.parent / "report/report.md").read_text()
    assert len(read_run(path.parent).lines) == len(lines)
    path.unlink()
    assert "metrics.jsonl: missing" in complaint(capsys, "train", "small.py")


@pytest.mark.parametrize("name", ["config.json", "model.json", "data.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[]", b"{}"])
def test_broken_files_of_a_run_are_named(folder, capsys, name, content):
    path = folder / "runs/small" / name
    path.write_bytes(content)
    if name == "data.json" and content == b"{}":
        return  # nothing was counted
    command = ["convert", "runs/small", "out"] if name == "model.json" else ["report", "runs/small"]
    assert complaint(capsys, *command).startswith(f"jaxalign {command[0]}: runs/small/{name}: ")
    assert not (folder / "out").exists()


# ------------------------------------------------------------------------------ its export


def test_convert_writes_what_the_end_of_the_run_wrote(folder):
    assert main(["convert", "runs/small", "converted"]) == 0
    export = folder / "runs/small/export"
    names = sorted(path.name for path in export.iterdir())
    assert names == sorted(path.name for path in (folder / "converted").iterdir())
    for name in names:
        assert (export / name).read_bytes() == (folder / "converted" / name).read_bytes(), name
    fields = json.loads((folder / "converted/config.json").read_text())
    assert {name: fields[name] for name in TOKENS} == TOKENS
    generation = json.loads((folder / "converted/generation_config.json").read_text())
    assert generation == {"eos_token_id": [3, 7]}


# ------------------------------------------------------------------------------ a full disk


@pytest.mark.parametrize("at", ["metrics.jsonl", "reference_log_probs.npz", "export", "report.md"])
def test_a_full_disk_is_one_line_and_the_same_command_resumes(folder, capsys, monkeypatch, at):
    whole = metrics(folder / "runs/small")
    full = OSError(errno.ENOSPC, "No space left on device")
    command = ["train", "small.py", "--name", "again"]
    with monkeypatch.context() as patch:
        if at == "metrics.jsonl":
            written = train.JsonLines.write

            def write(self, stage, split, step, values):
                if step == 2:
                    raise OutputError(f"{self._path}: cannot be written: {full.strerror}")
                written(self, stage, split, step, values)

            patch.setattr(train.JsonLines, "write", write)
        elif at == "export":
            import safetensors.numpy

            def save_file(*_, **__):
                raise RuntimeError("No space left on device (os error 28)")

            patch.setattr(safetensors.numpy, "save_file", save_file)
        else:
            fsync = os.fsync

            def failing(descriptor):
                if f"/{at}.partial" in os.readlink(f"/proc/self/fd/{descriptor}"):
                    raise full
                fsync(descriptor)

            patch.setattr(os, "fsync", failing)
        line = complaint(capsys, *command, status=1)
    where = "export/model.safetensors" if at == "export" else at
    assert f"{where}: cannot be written: No space left on device" in line
    assert main(command) == 0
    assert metrics(folder / "runs/again") == whole


# ------------------------------------------------------------------------------ SIGTERM


WAITING = """
import sys, time
from jaxalign.training.loop import _Terminated

done, saved = map(int, sys.argv[1:])
with _Terminated("sft", lambda: saved) as terminated:
    terminated.done, terminated.saved = done, saved
    print("ready", flush=True)
    time.sleep(60)  # as the main thread compiles, the loop does not come to look
"""


@pytest.mark.parametrize(("done", "signals", "least", "most"), [(3, 1, 1.5, 15), (5, 2, 0, 10)])
def test_sigterm_ends_what_does_not_come_to_the_end_of_its_step(done, signals, least, most):
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(done), "3"],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    begun = time.monotonic()
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert least < time.monotonic() - begun < most
    assert said.strip() == (
        f"jaxalign train: sft: stopped by SIGTERM after step {done}; saved up to step 3; run the "
        "same command again to resume"
    )
