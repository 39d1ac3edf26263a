"""The output head by itself: a shift of its matrix that an embedding with the same matrix lacks."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.models.config import ModelConfig
from jaxalign.models.decoder import unembedding

SHIFT = "shift"
"""Key of the shift beside the matrix."""

Params = Mapping[str, Any]


def zero_shift(params: Params, config: ModelConfig) -> Float[Array, "..."]:
    """A shift of the output head that changes nothing, in float32; shaped as its matrix.

    Args:
      params: nested dict of arrays.
      config: the architecture. Where the head is tied to the embedding, the shift is [vocabulary,
        width], and only the head sees it.
    """
    matrix = params["embed"]["embedding"] if config.tied else params["unembed"]["kernel"]
    return jnp.zeros_like(matrix, dtype=jnp.float32)


def with_shift(params: Params, shift: Float[Array, "..."]) -> dict[str, Any]:
    """The parameters with a shift beside the output head."""
    node = "unembed" if "unembed" in params else "embed"
    return {**params, node: {**params[node], SHIFT: shift}}


def shifted_head(
    hidden: Float[Array, "tokens width"], params: Params, config: ModelConfig
) -> tuple[Float[Array, "tokens inputs"], Float[Array, "inputs vocabulary"], Array | None]:
    """Hidden states, matrix and bias whose product are the logits, with the shift if there is one.

    In a narrow dtype the shift would be lost in the rounding of the matrix. There it is a matrix of
    its own, below the other one, and the hidden states are repeated.

    Args:
      hidden: hidden states, in the dtype of the computation.
      params: nested dict of arrays.
      config: the architecture.
    """
    kernel, bias = unembedding(params, config)
    shift = params["embed" if config.tied else "unembed"].get(SHIFT)
    if shift is None:
        return hidden, kernel, bias
    shift = (shift.T if config.tied else shift).astype(kernel.dtype)
    if hidden.dtype == kernel.dtype == jnp.float32:
        return hidden, kernel + shift, bias
    doubled = jnp.concatenate([hidden, hidden], axis=-1)
    return doubled, jnp.concatenate([kernel, shift], axis=0), bias
