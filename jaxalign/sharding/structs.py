"""Shapes of arrays where a run places them; nothing is computed."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxalign.sharding.rules import batch_sharding, parameter_shardings

Structs = Any
"""A tree of `jax.ShapeDtypeStruct`."""


def placed_parameters(tree: Structs, mesh: Mesh) -> Structs:
    """Shapes of parameters, or of what mirrors them, where a run places them.

    What lies in the tree twice does so in the result; numbers stay.
    """
    shardings, known = parameter_shardings(tree, mesh), {}

    def place(x: Any, sharding: NamedSharding) -> Any:
        if isinstance(x, float):
            return x
        made = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return known.setdefault(id(x), made)

    return jax.tree.map(place, tree, shardings)


def placed_batch(tree: Structs, mesh: Mesh) -> Structs:
    """Shapes of a batch, its rows split as a run splits them."""
    rows = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), tree)


def bytes_on_device(tree: Structs) -> int:
    """Bytes of a tree of placed shapes on one device; what lies in it twice counts once."""
    leaves = {id(x): x for x in jax.tree.leaves(tree) if not isinstance(x, float)}
    return sum(
        jnp.dtype(x.dtype).itemsize * math.prod(x.sharding.shard_shape(x.shape))
        for x in leaves.values()
    )
