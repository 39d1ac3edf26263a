"""Shapes of arrays with their shardings in a run, without computing anything."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxalign.sharding.rules import batch_sharding, parameter_shardings

Structs = Any
"""A tree of `jax.ShapeDtypeStruct`."""


def placed_parameters(tree: Structs, mesh: Mesh) -> Structs:
    """Shapes of parameters, or of trees that mirror them, with their shardings.

    A leaf that appears twice is the same object in the result; numbers stay as they are.
    """
    shardings, known = parameter_shardings(tree, mesh), {}

    def place(x: Any, sharding: NamedSharding) -> Any:
        if isinstance(x, float):
            return x
        made = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return known.setdefault(id(x), made)

    return jax.tree.map(place, tree, shardings)


def placed_batch(tree: Structs, mesh: Mesh) -> Structs:
    """Shapes of a batch, with its rows sharded."""
    rows = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), tree)


def bytes_on_device(tree: Structs) -> int:
    """Bytes of a tree of placed shapes on one device; a leaf that appears twice counts once."""
    leaves = {id(x): x for x in jax.tree.leaves(tree) if not isinstance(x, float)}
    return sum(
        jnp.dtype(x.dtype).itemsize * math.prod(x.sharding.shard_shape(x.shape))
        for x in leaves.values()
    )
