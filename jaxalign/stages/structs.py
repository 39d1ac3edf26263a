"""Shapes of batches, without computing anything."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.data import PairBatch, TextBatch


def pair_batch(
    pairs: int, sides: int, length: int, response: int, *, joint: int | None = None
) -> PairBatch:
    """Shapes of a batch of pairs, or of prompts with several responses.

    Args:
      pairs: number of pairs.
      sides: number of responses to each prompt.
      length: tokens of prompt and response.
      response: tokens of a response.
      joint: tokens of a row with both responses and a shared prefix; None: no such rows.
    """
    joint_tokens = None if joint is None else struct(pairs, joint)
    return record_of(
        PairBatch,
        tokens=struct(pairs, sides, length),
        prompt_length=struct(pairs, sides),
        response_tokens=struct(pairs, sides, response),
        response_length=struct(pairs, sides),
        record_index=struct(pairs),
        weight=struct(pairs, dtype=jnp.float32),
        joint_tokens=joint_tokens,
        common_length=None if joint is None else struct(pairs),
    )


def text_batch(rows: int, length: int) -> TextBatch:
    """Shapes of a batch of packed text: documents, or prompts and responses."""
    fields = ("tokens", "segment_ids", "positions", "target_mask")
    return record_of(
        TextBatch,
        **{name: struct(rows, length) for name in fields},
        record_index=struct(rows),
        weight=struct(rows, dtype=jnp.float32),
    )


def struct(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    """The shape and type of an array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def record_of(kind: Callable[..., Any], **fields: Any) -> Any:
    """A record whose arrays have these shapes."""

    def build() -> Any:
        return kind(**jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), fields))

    return jax.eval_shape(build)
