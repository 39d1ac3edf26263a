"""Slices of accelerators by name: their devices and their chip's data sheet."""

import os
import re
from collections.abc import Sequence
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


CHIPS = {
    "v5e": Chip(memory=int(15.75 * GIB), flops=197e12, bandwidth=819e9, link=200e9),
    "v5p": Chip(memory=int(95.74 * GIB), flops=459e12, bandwidth=2765e9, link=600e9),
    "v6e": Chip(memory=int(31.25 * GIB), flops=918e12, bandwidth=1638e9, link=400e9),
    "cpu": Chip(memory=None, flops=None, bandwidth=None, link=None),
}
"""From Google's pages on v5e, v5p and v6e, where link bandwidth counts both directions. Memory is
what the TPU compiler reports: on v5e and v6e less than on the page."""


def slice_devices(name: str) -> tuple[Sequence[Any], Chip]:
    """The devices of a slice, as targets of compilation, and their chip.

    Args:
      name: a TPU generation and its chips along each axis, "v5p:4x4x4", "v5e:16x16"; or "cpu:8",
        the simulated devices of this process.

    Raises:
      UserError: the name is not one of these, or the TPU compiler is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", shape):
        known = ", ".join(CHIPS)
        raise UserError(
            f"topology: {name!r} is not KIND:SHAPE with KIND one of {known}, e.g. v5p:4x4x4"
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
        described = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"topology: {name}: {reason}; the TPU compiler comes with pip install 'jaxalign[tpu]'"
        ) from None
    return described.devices, CHIPS[kind]
