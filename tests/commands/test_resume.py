"""A run killed at any moment and started again is the run that was never killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

EXPERIMENT = """
from jaxalign.config import (
    ArchitectureConfig, OptimizerConfig, PreferenceConfig, SupervisedConfig, TrainConfig,
)

def config():
    rate = OptimizerConfig(learning_rate=1e-3)
    return TrainConfig(
        architecture=ArchitectureConfig(width=32, layers=2, heads=2, kv_heads=1, mlp_width=64),
        max_length=96, max_records=200, max_eval_records=32,
        sft=SupervisedConfig(steps=40, batch_size=8, optimizer=rate, save_every=8),
        preference=PreferenceConfig(
            steps=40, batch_size=8, micro_batches=2, optimizer=rate, eval_every=16, save_every=8,
            reference="precomputed",
            loss="beta_dpo",  # remembers past batches
        ),
    )
"""
TIMES = ("tokens_per_second", "mfu")


class Runs:
    """Starts the same command again and again."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "experiment.py").write_text(EXPERIMENT)

    def start(self, name, *flags):
        command = [sys.executable, "-m", "jaxalign.cli", "train", "experiment.py", "--name", name]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache")}
        return subprocess.Popen(
            [*command, *flags],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, name, *flags):
        process = self.start(name, *flags)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return output

    def interrupt(self, name, stage, step, number, *flags):
        """Send a signal once the stage has logged the step; returns the exit status."""
        process = self.start(name, *flags)
        while not any(
            line["stage"] == stage and line["split"] == "train" and line["step"] >= step
            for line in self.lines(name)
        ):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.005)
        process.send_signal(number)
        process.communicate(timeout=120)
        return process.returncode

    def lines(self, name):
        path = self.folder / "runs" / name / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runs):
    runs.finish("whole")
    return runs.lines("whole")


@pytest.mark.slow
def test_killed_and_terminated_run_goes_on_bit_for_bit(runs, whole):
    assert runs.interrupt("broken", "sft", 21, signal.SIGKILL) == -signal.SIGKILL
    assert runs.interrupt("broken", "preference", 11, signal.SIGKILL) == -signal.SIGKILL
    assert runs.interrupt("broken", "preference", 19, signal.SIGTERM) == 143
    saved = runs.lines("broken")[-1]["step"]
    assert saved not in (24, 32, 40), "SIGTERM saved between the regular checkpoints"
    runs.finish("broken")
    assert runs.lines("broken") == whole
    for file in ("config.json", "model.safetensors"):
        a, b = (runs.folder / "runs" / name / "export" / file for name in ("whole", "broken"))
        assert a.read_bytes() == b.read_bytes()


@pytest.mark.slow
def test_run_restored_on_another_mesh_goes_on_with_the_same_numbers(runs, whole, monkeypatch):
    assert runs.interrupt("moved", "preference", 11, signal.SIGTERM) == 143
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    runs.finish("moved", "--mesh.fsdp", "2", "--mesh.tensor", "2")
    after = runs.lines("moved")
    assert [(x["stage"], x["split"], x["step"]) for x in after] == [
        (x["stage"], x["split"], x["step"]) for x in whole
    ]
    for ours, theirs in zip(after, whole, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_finished_run_is_reported_again_and_not_trained_again(runs, whole):
    output = runs.finish("whole")
    assert runs.lines("whole") == whole
    assert "reward margin" in output


def test_run_of_another_config_is_refused(runs, whole):
    process = runs.start("whole", "--seed", "1")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output.splitlines()[-1].startswith(
        "jaxalign train: runs/whole: holds a run with different seed"
    )
    assert "Traceback" not in output
