"""Who the processes of a run are is read from variables; wrong ones are named."""

import jax
import pytest

from jaxalign.errors import UserError
from jaxalign.sharding import make_mesh
from jaxalign.sharding.processes import data_shard, start

GOOD = {
    "JAXALIGN_COORDINATOR": "10.0.0.1:1234",
    "JAXALIGN_NUM_PROCESSES": "4",
    "JAXALIGN_PROCESS_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def asked(monkeypatch):
    """The arguments with which JAX was asked to start, nothing started."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    return calls


def test_variables_say_who_the_processes_are(asked):
    start(GOOD | SLURM)
    assert asked[0]["coordinator_address"] == "10.0.0.1:1234"
    assert (asked[0]["num_processes"], asked[0]["process_id"]) == (4, 3)


@pytest.mark.parametrize(
    "environment", [SLURM, {"OMPI_COMM_WORLD_SIZE": "2"}], ids=["slurm", "open mpi"]
)
def test_cluster_of_several_tasks_is_asked(asked, environment):
    start(environment)
    assert "process_id" not in asked[0]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        SLURM | {"SLURM_NTASKS": "1"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"},  # in a batch script, outside srun
        SLURM | {"JAXALIGN_NUM_PROCESSES": "1"},
    ],
    ids=["laptop", "one task", "batch script", "by itself"],
)
def test_process_by_itself_starts_nothing(asked, environment):
    start(environment)
    assert asked == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"JAXALIGN_COORDINATOR": ""}, "JAXALIGN_COORDINATOR: missing beside JAXALIGN_NUM"),
        ({"JAXALIGN_COORDINATOR": "10.0.0.1"}, "JAXALIGN_COORDINATOR: '10.0.0.1' is not HOST:PORT"),
        ({"JAXALIGN_NUM_PROCESSES": "four"}, "JAXALIGN_NUM_PROCESSES: 'four' is not a whole"),
        ({"JAXALIGN_PROCESS_ID": "-1"}, "JAXALIGN_PROCESS_ID: '-1' is not a whole"),
        ({"JAXALIGN_PROCESS_ID": "4"}, "JAXALIGN_PROCESS_ID: 4 is not one of 4"),
    ],
)
def test_wrong_variable_is_named(asked, change, named):
    with pytest.raises(UserError, match=named) as error:
        start(GOOD | change)
    assert "\n" not in str(error.value)
    assert asked == []


def test_processes_that_do_not_come_together_are_a_users_error(monkeypatch, asked):
    def fail(**_):
        raise RuntimeError("DEADLINE_EXCEEDED: nobody there\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match=r"10.0.0.1:1234: .*nobody there\)") as error:
        start(GOOD)
    assert "\n" not in str(error.value)


class Device:
    """As much of a device as a mesh and the shares need."""

    def __init__(self, number, process_index):
        self.id, self.process_index = number, process_index


@pytest.mark.parametrize(
    ("sizes", "owners", "shard"),
    [
        ((4, 1, 1), (0, 0, 1, 1), (0, 2)),
        ((2, 2, 1), (1, 1, 0, 0), (1, 2)),
        ((4, 1, 1), (0, 1, 0, 1), (0, 2)),  # slices number their chips by position
        ((1, 2, 2), (0, 1, 2, 3), (0, 2)),  # two processes hold each row
        ((1, 1, 4), (0, 1, 2, 3), (0, 1)),
    ],
)
def test_data_shard_is_that_of_the_process_devices(sizes, owners, shard):
    devices = [Device(*pair) for pair in enumerate(owners)]
    data, fsdp, tensor = sizes
    assert data_shard(make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)) == shard


def test_rows_shared_in_part_are_refused():
    devices = [Device(number, number // 3) for number in range(6)]
    with pytest.raises(UserError, match="sequence x tensor = 2 devices"):
        data_shard(make_mesh(data=3, tensor=2, devices=devices))
