"""Meshes, and the one table that says which mesh axis splits which axis of an array."""

from jaxalign.sharding.mesh import make_mesh as make_mesh
from jaxalign.sharding.mesh import parameter_parts as parameter_parts
from jaxalign.sharding.mesh import row_parts as row_parts
from jaxalign.sharding.mesh import with_all_axes as with_all_axes
from jaxalign.sharding.rules import (
    batch_sharding,
    head_sharding,
    parameter_shardings,
    place,
    replicated,
    shard_batch,
    state_sharding,
    table_sharding,
)

__all__ = [
    "batch_sharding",
    "head_sharding",
    "make_mesh",
    "parameter_shardings",
    "place",
    "replicated",
    "shard_batch",
    "state_sharding",
    "table_sharding",
    "with_all_axes",
]
