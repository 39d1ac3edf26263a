"""Runs of several processes: start, synchronise and end together."""

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
from jaxalign.sharding.mesh import row_parts

COORDINATOR, NUMBER, OWN = VARIABLES = (
    "JAXALIGN_COORDINATOR",
    "JAXALIGN_NUM_PROCESSES",
    "JAXALIGN_PROCESS_ID",
)
PATIENCE = 300
"""Seconds within which all processes must connect."""
HEARTBEAT = 30
"""Seconds without a heartbeat after which a process counts as dead and the run ends."""
BROKEN = ("Gloo", "NCCL", "UNAVAILABLE", "coordination service", "heartbeat")
"""Words in errors that are caused by the end of another process."""
RESUME = "the same command in all processes resumes from the newest checkpoint"


def start(environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes of this run, if there are any; before the first use of a device.

    Three variables describe them: JAXALIGN_COORDINATOR (host:port of process 0),
    JAXALIGN_NUM_PROCESSES and JAXALIGN_PROCESS_ID; without them JAX detects the cluster: Cloud
    TPU, Slurm, Open MPI, Kubernetes. JAXALIGN_NUM_PROCESSES=1 runs a process of a cluster alone.

    Raises:
      UserError: a variable is missing or invalid, or the other processes cannot be reached.
    """
    settings = {name: environment[name] for name in VARIABLES if environment.get(name)}
    if settings == {NUMBER: "1"} or not (settings or _in_cluster(environment)):
        return
    options: dict[str, Any] = _explicit(settings) if settings else {}
    me = (
        f"process {options['process_id']} of {options['num_processes']}" if options else "a process"
    )
    sys.stderr.write(
        f"jaxalign: {me} joins {options.get('coordinator_address', 'its cluster')}; it waits "
        f"up to {PATIENCE} s for the others. If one of them dies, all end, and {RESUME}\n"
    )
    # the loop agrees on SIGTERM itself; before and after it, SIGTERM ends the process
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **options, initialization_timeout=PATIENCE, heartbeat_timeout_seconds=HEARTBEAT
        )
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{COORDINATOR}: {settings.get(COORDINATOR, 'of the cluster')}: the processes cannot "
            f"connect ({reason}); start all of them at once with {', '.join(VARIABLES)} set, or "
            f"set {NUMBER}=1 for a single process"
        ) from error
    if jax.process_index() != 0:
        progress.silence()
        leave_notices_to("process 0")


def _explicit(settings: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of `jax.distributed.initialize` from the variables."""
    if missing := [name for name in VARIABLES if name not in settings]:
        raise UserError(
            f"{', '.join(missing)}: missing beside {', '.join(settings)}; set "
            f"{COORDINATOR}=HOST:PORT (of process 0), {NUMBER} and {OWN} (from 0), or none of them"
        )
    if not re.fullmatch(r".+:\d{1,5}", settings[COORDINATOR]):
        raise UserError(f"{COORDINATOR}: {settings[COORDINATOR]!r} is not HOST:PORT of process 0")
    for name in (NUMBER, OWN):
        if not re.fullmatch(r"\d+", settings[name]):
            raise UserError(f"{name}: {settings[name]!r} is not a whole number")
    number, own = int(settings[NUMBER]), int(settings[OWN])
    if own >= number:
        raise UserError(f"{OWN}: {own} is not one of {number} processes, counted from 0")
    return {
        "coordinator_address": settings[COORDINATOR],
        "num_processes": number,
        "process_id": own,
        "cluster_detection_method": "deactivate",
    }


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether a cluster that JAX can detect may have started this process as one of several."""

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
    """Run the body in process 0 first, then in the others, which find the files that it wrote."""
    if jax.process_index() != 0:
        multihost_utils.sync_global_devices(name)
    yield
    if jax.process_index() == 0 and jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast_flag(value: bool) -> bool:
    """The value in process 0, on all processes."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def any_process(flag: bool) -> bool | jax.Array:
    """Whether the flag is set in any process: a scalar to be read later, without waiting here."""
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
    """The shard of every batch that this process feeds: its index and the number of shards.

    Processes whose devices have the same rows, because a sequence or tensor axis spans them, feed
    the same shard.

    Raises:
      UserError: the devices of some processes have some rows in common, but not all.
    """
    held: dict[int, set[int]] = {}
    rows = mesh.devices.reshape(row_parts(mesh), -1)
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
    """End a process at once on an error, which also ends the other processes of the run.

    Otherwise it would wait at its exit for the others, which wait for it in the next collective.
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
            text = f"another process has ended, so this one ends too ({reason}); {RESUME}"
            status = 1
        else:
            text, status = f"{traceback.format_exc()}{RESUME}", 1
        sys.stdout.flush()
        me = f"process {jax.process_index()} of {jax.process_count()}"
        sys.stderr.write(f"jaxalign {command}: {me}: {text}\n")
        sys.stderr.flush()
        os._exit(status)
