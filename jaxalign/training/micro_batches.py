"""Split a batch into micro-batches and join them; any pytree whose first axes are rows."""

from typing import Any

import jax
from jaxtyping import Array


def split_micro_batches(batch: Any, parts: int) -> Any:
    """[rows, ...] -> [parts, rows / parts, ...]; each part has rows of all devices."""

    def split(x: Array) -> Array:
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def join_micro_batches(parts: Any) -> Any:
    """The inverse of `split_micro_batches`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)
