"""Sharding rules: which mesh axis splits which axis of a parameter, by the parameter's name."""

import itertools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.sharding.mesh import ROWS

LOGICAL_TO_MESH = {
    "batch": ROWS,
    "length": "sequence",
    "width": ("fsdp", "expert", "sequence"),
    "experts": "expert",
    "expert_width": ("fsdp", "sequence"),
    "heads": "tensor",
    "mlp": "tensor",
    "vocabulary": "tensor",
    "layers": None,
    "rank": None,
}

PARAMETER_AXES = {
    ("embed", "embedding"): ("vocabulary", "width"),
    ("unembed", "kernel"): ("width", "vocabulary"),
    ("q", "kernel"): ("layers", "width", "heads"),
    ("k", "kernel"): ("layers", "width", "heads"),
    ("v", "kernel"): ("layers", "width", "heads"),
    ("o", "kernel"): ("layers", "heads", "width"),
    ("gate", "kernel"): ("layers", "width", "mlp"),
    ("up", "kernel"): ("layers", "width", "mlp"),
    ("down", "kernel"): ("layers", "mlp", "width"),
}
"""The last two names of a parameter's path -> the logical name of each of its axes."""
EXPERT_AXES = {
    "gate": ("layers", "experts", "expert_width", "mlp"),
    "up": ("layers", "experts", "expert_width", "mlp"),
    "down": ("layers", "experts", "mlp", "expert_width"),
}
"""The same for kernels of experts, by the name of the matrix; adapters follow its first two."""


def _names(path) -> list[str]:
    return [
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    ]


def _spec(path, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The rule of the parameter at the end of the path; axes that do not divide are not split."""
    names = _names(path)
    logical = _of_experts(names, len(shape)) or next(
        (PARAMETER_AXES[pair] for pair in itertools.pairwise(names) if pair in PARAMETER_AXES),
        None,
    )
    if logical is None or len(logical) != len(shape):
        return P()  # vectors, adapters and statistics of unknown shape: small, replicated
    axes = []
    for name, size in zip(logical, shape, strict=True):
        axis = LOGICAL_TO_MESH[name]
        named = (axis,) if isinstance(axis, str) else axis or ()
        parts = math.prod(mesh.shape[one] for one in named)
        axes.append(axis if size % parts == 0 else None)
    return P(*axes)


def _of_experts(names: list[str], axes: int) -> tuple[str, ...] | None:
    """The logical axes of a parameter of experts; None: it is none."""
    if len(names) < 3 or names[-3] != "experts" or names[-2] not in EXPERT_AXES or axes != 4:
        return None
    whole = EXPERT_AXES[names[-2]]
    return whole if names[-1] == "kernel" else (*whole[:2], "rank", "rank")


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of parameters, or of anything that mirrors them.

    The paths of optimiser moments end with their parameter's path, so that one table serves
    parameters, moments and accumulated gradients.

    Args:
      tree: arrays, numbers or shape structs.
      mesh: a mesh from `make_mesh`.

    Returns:
      The same tree with a `NamedSharding` at each leaf.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(path, np.shape(leaf), mesh)), tree
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split on their first axis over data, fsdp and expert."""
    return NamedSharding(mesh, P(LOGICAL_TO_MESH["batch"]))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch on the mesh, its rows split over data, fsdp and expert.

    Args:
      batch: a pytree of host arrays with this process's rows.
      mesh: the devices.
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )


def state_sharding(mesh: Mesh) -> NamedSharding:
    """States [rows, length, ...] are split on rows as batches are, on length over sequence."""
    return NamedSharding(mesh, P(LOGICAL_TO_MESH["batch"], LOGICAL_TO_MESH["length"]))


def head_sharding(mesh: Mesh) -> NamedSharding:
    """Queries [rows, length, heads, head_width]: as states, and on heads over tensor."""
    axes = (LOGICAL_TO_MESH[name] for name in ("batch", "length", "heads"))
    return NamedSharding(mesh, P(*axes, None))


def table_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an embedding during lookups: split by ids only."""
    return NamedSharding(mesh, P(LOGICAL_TO_MESH["vocabulary"], None))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def place(tree: Any, mesh: Mesh) -> Any:
    """Copy every leaf to the mesh by the sharding rules.

    Leaves are copied even if the sharding does not change: one that shares its buffer with another
    tree would be deleted when that tree is donated.
    """
    shardings = parameter_shardings(tree, mesh)
    return jax.tree.map(_copy, tree, shardings)


def _copy(leaf: Any, to: NamedSharding) -> jax.Array:
    if to.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
        if isinstance(leaf, jax.Array) and leaf.sharding != to:
            leaf = jax.device_put(leaf, to)  # it may still share a buffer with the old array
        return jax.device_put(leaf, to, may_alias=False)
    host = np.asarray(leaf)  # all processes have the whole array; each places its own shards
    return jax.make_array_from_callback(host.shape, to, lambda index: host[index])
