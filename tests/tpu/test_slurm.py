"""`gpu/slurm.sbatch`: one process per GPU, and back into the queue after SIGTERM."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "bash gpu/slurm.sbatch"
RUN = "experiments/offline/hh.py:dpo --name 'two words'"


def options():
    text = (ROOT / "gpu" / "slurm.sbatch").read_text()
    lines = [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    return dict(line.partition("=")[::2] for line in lines)


def test_one_process_per_gpu_and_a_signal_before_the_end():
    asked = options()
    assert asked["--ntasks-per-node"] == asked["--gpus-per-node"]
    assert asked["--signal"].startswith("TERM@")  # without B: every process gets it
    assert "--requeue" in asked


def test_the_command_is_the_one_given(cloud):
    done = cloud.run(f"{SCRIPT} {RUN}", SLURM_JOB_ID="7")
    assert done.returncode == 0, done.stderr
    (words,) = cloud.recorded
    assert words[0] == "srun"
    run = ["jaxalign", "train", "experiments/offline/hh.py:dpo", "--name", "two words"]
    assert words[words.index("jaxalign") :] == run


@pytest.mark.parametrize(
    ("status", "state", "again"),
    [("143", "RUNNING", True), ("143", "COMPLETING", False), ("1", "RUNNING", False)],
)
def test_only_a_saved_run_of_a_running_job_is_queued_again(cloud, status, state, again):
    done = cloud.run(f"{SCRIPT} {RUN}", answers=state, SLURM_JOB_ID="7", SRUN_STATUS=status)
    assert done.returncode == int(status)
    assert (["scontrol", "requeue", "7"] in cloud.recorded) is again


def test_an_experiment_is_needed(cloud):
    done = cloud.run(SCRIPT)
    assert done.returncode == 2
    assert "the experiment is missing" in done.stderr
