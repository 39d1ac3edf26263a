"""A run over several processes is the run of one, and one that dies takes the others with it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from jaxalign.data import embedded_preferences

EXPERIMENT = """
from jaxalign.config import ArchitectureConfig, OptimizerConfig, PreferenceConfig, TrainConfig

def config():
    rate = OptimizerConfig(learning_rate=1e-3)
    return TrainConfig(
        architecture=ArchitectureConfig(width=32, layers=2, heads=2, kv_heads=2, mlp_width=64),
        max_length=96, max_records=32, max_eval_records=7,
        preference=PreferenceConfig(
            steps=4, batch_size=8, micro_batches=2, optimizer=rate, eval_every=2, save_every=2,
            loss="bco",  # a running statistic
        ),
    )
"""
TIMES = ("tokens_per_second", "mfu")
ACCURACIES = {"rewards/accuracies", "logps/accuracies", "logps/mean_accuracies"}
UNDECIDED: dict[bool, set[str]] = {True: ACCURACIES, False: set()}
PATIENCE = 600.0  # seconds


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Runs:
    """Starts the same command in one process or several."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "experiment.py").write_text(EXPERIMENT)
        self.started = []

    def start(self, name, processes, *flags, own_flags=types.MappingProxyType({})):
        """The processes of a run; what they print goes into files."""
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
            # half of the time is compilation
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_backend_optimization_level=0",
        }
        if processes > 1:
            environment |= {
                "JAXALIGN_COORDINATOR": f"127.0.0.1:{free_port()}",
                "JAXALIGN_NUM_PROCESSES": str(processes),
            }
        command = [sys.executable, "-m", "jaxalign.cli", "train", "experiment.py", "--name", name]
        run = []
        for number in range(processes):
            own = {"JAXALIGN_PROCESS_ID": str(number)} if processes > 1 else {}
            with self.output_file(name, number).open("w") as output:
                run.append(
                    subprocess.Popen(
                        [*command, *flags, *own_flags.get(number, ())],
                        cwd=self.folder,
                        env=environment | own,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        self.started += run
        return run

    def stop(self):
        for process in self.started:
            process.kill()
            process.wait()

    def output_file(self, name, number):
        return self.folder / f"{name}-{number}.txt"

    def output(self, name, number):
        return self.output_file(name, number).read_text()

    def ends(self, run):
        """The exit status of each process."""
        return [process.wait(timeout=PATIENCE) for process in run]

    def finish(self, name, processes, *flags):
        ends = self.ends(self.start(name, processes, *flags))
        assert ends == [0] * processes, [self.output(name, n) for n in range(processes)]
        return name

    def lines(self, name):
        path = self.folder / "runs" / name / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]

    def wait_for(self, name, run, step):
        """Until the run has logged a step of training."""
        while not any(x["split"] == "train" and x["step"] >= step for x in self.lines(name)):
            assert all(process.poll() is None for process in run), self.output(name, 0)
            time.sleep(0.005)

    def weights(self, name, file="export/model.safetensors"):
        from safetensors.numpy import load_file

        return load_file(self.folder / "runs" / name / file)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("processes"))
    try:
        yield runs
    finally:
        runs.stop()


def assert_same_run(runs, name, other):
    ours, theirs = runs.lines(name), runs.lines(other)
    assert [(x["split"], x["step"]) for x in ours] == [(x["split"], x["step"]) for x in theirs]
    for line, expected in zip(ours, theirs, strict=True):
        assert line.keys() == expected.keys()
        # before the first step policy and reference are equal, and the sign of 0 is rounding
        for key in line.keys() - {"stage", "split"} - UNDECIDED[line["step"] < 2]:
            assert line[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5), (key, line)
    weights, expected = runs.weights(name), runs.weights(other)
    for key in weights.keys() | expected.keys():
        # where a gradient is nearly 0, rounding decides part of AdamW's step of up to 1e-3
        np.testing.assert_allclose(weights[key], expected[key], atol=5e-5, err_msg=key)


def test_two_processes_train_as_one(runs):
    runs.finish("alone", 1)
    runs.finish("two", 2, "--mesh.fsdp", "2")
    assert_same_run(runs, "two", "alone")
    saved = runs.folder / "runs/two/checkpoints/preference/4/state"
    writers = {part.name for part in saved.glob("ocdbt.process_*")}
    assert writers == {"ocdbt.process_0", "ocdbt.process_1"}
    assert "report:" in runs.output("two", 0)
    assert "report:" not in runs.output("two", 1)


@pytest.mark.slow
def test_four_processes_train_adapters_against_a_kept_reference_as_one(runs):
    flags = ("--sft.steps", "2", "--lora.rank", "4", "--reference", "precomputed")
    runs.finish("alone_adapters", 1, *flags)
    runs.finish("four_adapters", 4, *flags, "--mesh.fsdp", "2", "--mesh.data", "2")
    assert_same_run(runs, "four_adapters", "alone_adapters")


@pytest.mark.slow
def test_processes_that_share_rows_feed_the_same_ones(runs):
    runs.finish("alone_tensor", 1, "--loss", "kto")
    runs.finish("four_tensor", 4, "--loss", "kto", "--mesh.data", "2", "--mesh.tensor", "2")
    assert_same_run(runs, "four_tensor", "alone_tensor")


@pytest.mark.slow
def test_processes_stream_their_data_and_train_as_one_in_memory(runs):
    folder = runs.folder / "pairs"
    folder.mkdir()
    rows = [
        json.dumps({"prompt": one.prompt, "chosen": one.chosen, "rejected": one.rejected})
        for one in embedded_preferences(80)
    ]
    for number in range(2):  # a part of the index for each process
        (folder / f"{number}.jsonl").write_text("\n".join(rows[number::2]))
    flags = ("--data", "pairs", "--streaming")
    runs.finish("in_memory", 1, *flags, "never")
    runs.finish("streamed", 2, *flags, "always", "--mesh.fsdp", "2")
    assert_same_run(runs, "streamed", "in_memory")
    assert "data: 80 records of pairs stay on disk" in runs.output("streamed", 0)
    assert "stay on disk" not in runs.output("streamed", 1)
    runs.finish("streamed_again", 2, *flags, "always", "--mesh.fsdp", "2")
    assert "indexing" not in runs.output("streamed_again", 0)
    assert_same_run(runs, "streamed_again", "in_memory")


@pytest.mark.slow
def test_one_process_killed_ends_all_and_the_run_goes_on(runs):
    long = ("--preference.steps", "80", "--preference.save-every", "8")
    long += ("--preference.eval-every", "0", "--reference", "precomputed")
    runs.finish("whole", 2, *long)
    for victim, step in ((1, 10), (0, 26)):
        run = runs.start("broken", 2, *long)
        runs.wait_for("broken", run, step)
        run[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        status = runs.ends(run)
        assert time.monotonic() - killed < 60
        assert status[victim] == -signal.SIGKILL
        assert status[1 - victim] != 0
        said = runs.output("broken", 1 - victim)
        assert "another process has ended" in said or "another task died" in said, said
    run = runs.start("broken", 2, *long)
    runs.wait_for("broken", run, 42)
    run[1].send_signal(signal.SIGTERM)
    assert runs.ends(run) == [143, 143]
    said = [runs.output("broken", number).splitlines()[-1] for number in (0, 1)]
    assert "stopped by SIGTERM at step" in said[0]
    assert said[0] == said[1]
    runs.finish("broken", 2, *long)
    assert_same_run(runs, "broken", "whole")


def test_error_of_one_process_ends_all(runs):
    run = runs.start("apart", 2, own_flags={1: ("--output", "elsewhere")})
    assert runs.ends(run[1:]) == [2]
    failed = time.monotonic()
    assert runs.ends(run[:1]) != [0]
    assert time.monotonic() - failed < 60
    assert "process 1 of 2: elsewhere/apart: is not the folder" in runs.output("apart", 1)
