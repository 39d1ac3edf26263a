"""Device meshes with the axes data, fsdp, expert, sequence and tensor."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxalign.errors import UserError

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
ROWS = AXES[:3]
"""The axes that a batch's rows are split over."""


def row_parts(mesh: Mesh) -> int:
    """Number of parts into which a batch's rows are split."""
    return math.prod(mesh.shape.get(axis, 1) for axis in ROWS)


def parameter_parts(mesh: Mesh) -> int:
    """Number of parts into which the rows of matrices are split, without the tensor axis."""
    return math.prod(mesh.shape.get(axis, 1) for axis in ("fsdp", "expert", "sequence"))


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    expert: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    devices=None,
) -> Mesh:
    """A mesh over `AXES`; one size may be -1: all the rest.

    Args:
      data: replicas of the parameters; the batch is split over them.
      fsdp: shards of parameters and optimiser state (ZeRO-3); also splits the batch.
      expert: shards of the experts of a mixture; other parameters and the batch are split over
        them, too.
      sequence: shards of the positions of a row; also splits parameters.
      tensor: shards of heads, MLP width and vocabulary.
      devices: the devices to use; all of them by default.

    Returns:
      A mesh with Auto axes: the compiler chooses the shardings that the rules leave open.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [data, fsdp, expert, sequence, tensor]
    named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"mesh: {named}: each size is at least 1, and one of them may be -1")
    known = math.prod(size for size in sizes if size != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise UserError(
            f"mesh: {named} takes {known} devices, and there are {len(devices)}: "
            "set the sizes so that their product is the number of devices, or one of them to -1"
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def with_all_axes(mesh: Mesh) -> Mesh:
    """A mesh of one's own, with the axes of `AXES` that it lacks of size 1.

    Args:
      mesh: its axes are some of `AXES`, in any order.

    Raises:
      UserError: it has another axis.
    """
    if unknown := [name for name in mesh.axis_names if name not in AXES]:
        raise UserError(f"mesh: axis {unknown[0]!r} is none of {', '.join(AXES)}")
    order = [mesh.axis_names.index(name) for name in AXES if name in mesh.axis_names]
    sizes = [mesh.shape.get(name, 1) for name in AXES]
    return Mesh(
        mesh.devices.transpose(order).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )
