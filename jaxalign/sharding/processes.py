"""Many processes as one run: starting them, what one does for all, and ending together."""

import contextlib
import functools
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign import progress
from jaxalign.errors import OutputError, UserError, leave_notices_to

COORDINATOR, NUMBER, OWN = VARIABLES = (
    "JAXALIGN_COORDINATOR",
    "JAXALIGN_NUM_PROCESSES",
    "JAXALIGN_PROCESS_ID",
)
PATIENCE = 300
"""Seconds within which all processes have to come."""
HEARTBEAT = 30
"""Seconds without a sign of life after which a process is taken for dead, and the run ends."""
BROKEN = ("Gloo", "NCCL", "UNAVAILABLE", "coordination service", "heartbeat")
"""What errors say whose cause is another process."""
GO_ON = "the same command in all processes resumes from the newest checkpoint"


def start(environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes of this run, if there are any; before the first use of a device.

    Three variables say who they are, JAXALIGN_COORDINATOR (host:port of process 0),
    JAXALIGN_NUM_PROCESSES and JAXALIGN_PROCESS_ID; without them JAX asks the cluster: Cloud TPU,
    Slurm, Open MPI, Kubernetes. JAXALIGN_NUM_PROCESSES=1 keeps a process of a cluster by itself.

    Raises:
      UserError: a variable is missing or wrong, or the others cannot be reached.
    """
    given = {name: environment[name] for name in VARIABLES if environment.get(name)}
    if given == {NUMBER: "1"} or not (given or _in_cluster(environment)):
        return
    who: dict[str, Any] = _explicit(given) if given else {}
    me = f"process {who['process_id']} of {who['num_processes']}" if who else "a process"
    sys.stderr.write(
        f"jaxalign: {me} joins {who.get('coordinator_address', 'its cluster')}; all are awaited "
        f"for {PATIENCE} s. If one of them dies, all end, and {GO_ON}\n"
    )
    # the loop agrees on SIGTERM itself; before and after it, SIGTERM ends the process
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **who, initialization_timeout=PATIENCE, heartbeat_timeout_seconds=HEARTBEAT
        )
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{COORDINATOR}: {given.get(COORDINATOR, 'as the cluster says')}: the processes do not "
            f"come together ({reason}); start all of them at once and let {', '.join(VARIABLES)} "
            f"say who they are, or set {NUMBER}=1 for a process by itself"
        ) from error
    if jax.process_index() != 0:
        progress.silence()
        leave_notices_to("process 0")


def _explicit(given: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of `jax.distributed.initialize` that the variables give."""
    if missing := [name for name in VARIABLES if name not in given]:
        raise UserError(
            f"{', '.join(missing)}: missing beside {', '.join(given)}; set {COORDINATOR}=HOST:PORT"
            f" (of process 0), {NUMBER} and {OWN} (from 0), or none of them"
        )
    if not re.fullmatch(r".+:\d{1,5}", given[COORDINATOR]):
        raise UserError(f"{COORDINATOR}: {given[COORDINATOR]!r} is not HOST:PORT of process 0")
    for name in (NUMBER, OWN):
        if not re.fullmatch(r"\d+", given[name]):
            raise UserError(f"{name}: {given[name]!r} is not a whole number")
    number, own = int(given[NUMBER]), int(given[OWN])
    if own >= number:
        raise UserError(f"{OWN}: {own} is not one of {number} processes; they count from 0")
    return {
        "coordinator_address": given[COORDINATOR],
        "num_processes": number,
        "process_id": own,
        "cluster_detection_method": "deactivate",
    }


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether a cluster may have started this process as one of several that JAX can find."""

    def several(name: str) -> bool:
        return environment.get(name, "").isdigit() and int(environment[name]) > 1

    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if several("SLURM_NTASKS") and all(name in environment for name in slurm):
        return True
    if several("OMPI_COMM_WORLD_SIZE"):
        return True
    if "tpu" in (jax.config.values["jax_platforms"] or ""):  # JAX itself sets it on a Cloud TPU
        hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
        if hosts is None:  # JAX asks the metadata server
            return "TPU_SKIP_MDS_QUERY" not in environment
        return "," in hosts or several("MEGASCALE_NUM_SLICES")
    job = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(environment)
    return job and importlib.util.find_spec("kubernetes") is not None


@contextlib.contextmanager
def in_turn(name: str) -> Iterator[None]:
    """Process 0 does what is inside first; the others follow and find what it has written."""
    if jax.process_index() != 0:
        multihost_utils.sync_global_devices(name)
    yield
    if jax.process_index() == 0 and jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def first_says(value: bool) -> bool:
    """The value that process 0 has, in all of them."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def anywhere(flag: bool) -> bool | jax.Array:
    """Whether any process has the flag set: a scalar to be read later, nobody waits for it here."""
    if jax.process_count() == 1:
        return flag
    everywhere, join = _any()
    own = np.full(jax.local_device_count(), flag)
    return join(jax.make_array_from_process_local_data(everywhere, own))


@functools.cache
def _any() -> tuple[NamedSharding, Any]:
    mesh = Mesh(np.asarray(jax.devices()), "devices")
    return NamedSharding(mesh, P("devices")), jax.jit(
        jnp.any, out_shardings=NamedSharding(mesh, P())
    )


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process feeds: its number, and of how many.

    Processes whose devices hold the same rows, since a sequence or tensor axis runs through them,
    feed the same part.

    Raises:
      UserError: the devices of some processes share some rows and not others.
    """
    held: dict[int, set[int]] = {}
    rows = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    for row, devices in enumerate(rows):
        for device in devices:
            held.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(part)) for part in held.values()})
    if any(len(part) * len(parts) != len(rows) for part in parts):
        raise UserError(
            f"mesh: sequence x tensor = {rows.shape[1]} devices share rows and belong to parts of "
            "processes; let it divide the devices of a process, or be a multiple of them"
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


@contextlib.contextmanager
def ending_together(command: str) -> Iterator[None]:
    """An error in one of many processes ends that process at once, and so the others, too.

    Without this, it would wait at its exit for the others, which wait for it in the next
    collective.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, UserError):
            text, status = str(error), 2
        elif isinstance(error, OutputError):
            text, status = str(error), 1
        elif any(word in str(error) for word in BROKEN):
            reason = str(error).splitlines()[0]
            text = f"another process has ended, and so does this one ({reason}); {GO_ON}"
            status = 1
        else:
            text, status = f"{traceback.format_exc()}{GO_ON}", 1
        sys.stdout.flush()
        me = f"process {jax.process_index()} of {jax.process_count()}"
        sys.stderr.write(f"jaxalign {command}: {me}: {text}\n")
        sys.stderr.flush()
        os._exit(status)
