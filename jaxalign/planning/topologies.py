"""Slices of accelerators by name: their devices and their chip's data sheet."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxalign.errors import UserError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Data sheet of one accelerator; None: unknown."""

    memory: int | None
    """Bytes that are available to a program."""
    flops: float | None
    """Dense bfloat16 FLOP/s."""
    bandwidth: float | None
    """Bytes per second between the chip and its memory."""
    link: float | None
    """Bytes per second received over all links between chips together."""
    network: float | None = None
    """Bytes per second received over the network between slices."""


V5E = Chip(memory=int(15.75 * GIB), flops=197e12, bandwidth=819e9, link=200e9, network=3.125e9)
V5P = Chip(memory=int(95.74 * GIB), flops=459e12, bandwidth=2765e9, link=600e9, network=6.25e9)
V6E = Chip(memory=int(31.25 * GIB), flops=918e12, bandwidth=1638e9, link=400e9, network=12.5e9)
UNKNOWN = Chip(memory=None, flops=None, bandwidth=None, link=None)
CHIPS = {"v5e": V5E, "v5p": V5P, "v6e": V6E, "cpu": UNKNOWN}
"""From Google's pages on v5e, v5p and v6e, where link bandwidth counts both directions. Memory is
what the TPU compiler reports: on v5e and v6e less than on the page."""


def slice_devices(name: str) -> tuple[Sequence[Any], Chip]:
    """The devices of a slice, as targets of compilation, and their chip.

    Args:
      name: a TPU generation and its chips along each axis, "v5p:4x4x4", "v5e:16x16"; several such
        slices, joined by a network, "2xv5p:4x4x4"; or "cpu:8", the simulated devices of this
        process.

    Returns:
      The devices, slice by slice, and their chip.

    Raises:
      UserError: the name is not one of these, or the TPU compiler is not installed.
    """
    parts = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+):(\d+(?:x\d+)*)", name)
    slices, kind, shape = parts.groups() if parts else (None, "", "")
    if kind not in CHIPS or (kind == "cpu" and (slices or "x" in shape)):
        known = ", ".join(CHIPS)
        raise UserError(
            f"topology: {name!r} is not KIND:SHAPE with KIND one of {known}, e.g. v5p:4x4x4, "
            "or several of these, 2xv5p:4x4x4"
        )
    if kind == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < int(shape):
            raise UserError(
                f"topology: {name}: this process has {len(devices)} CPU devices; "
                f"set JAX_NUM_CPU_DEVICES={shape}"
            )
        return devices[: int(shape)], CHIPS[kind]
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # and no chip to lock
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{shape}", num_slices=int(slices or 1)
        )
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"topology: {name}: {reason}; the TPU compiler comes with pip install 'jaxalign[tpu]'"
        ) from None
    return described.devices, CHIPS[kind]


def slices_of(devices: Iterable[Any]) -> int:
    """The number of slices that devices belong to."""
    return len({getattr(device, "slice_index", 0) for device in devices})
