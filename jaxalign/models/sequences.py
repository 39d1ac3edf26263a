"""Packed rows taken apart into plain ones, for attention kernels that know causality alone.

A packed row holds pairs (a common prefix, the rest of the chosen sequence, the rest of the rejected
one) or single responses with their prompts. Only attention has to know it. So queries, keys and
values of each sequence, prefix and rest, are gathered into a row of their own, the fused kernel
mixes them, and each token takes its result back. What a prefix receives from both of its sequences
adds up in the gradient.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign.records import AnyArray, record

PARTS = 3
"""Segments of a pair, in this order: common prefix, rest of chosen, rest of rejected."""


@record
class Sequences:
    """Where the tokens of a packed row's sequences lie, and where they lie in the plain rows.

    Attributes:
      indices: index in the packed row of each sequence's tokens; anything after its last.
      slots: of each packed token, its indices in the plain rows, one after the other: one for each
        sequence that has it; -1 where there is none.
    """

    indices: Int[AnyArray, "rows sequences longest"]
    slots: Int[AnyArray, "rows length 2"]


def sequences_of(
    segment_ids: Int[Array, "rows length"], examples: int, sides: int, longest: int
) -> Sequences:
    """The sequences of packed rows.

    Args:
      segment_ids: 3 i + 1, 3 i + 2 and 3 i + 3 for the parts of a row's pair i, in this order, or
        3 i + 2 for its single response i; 0 is padding.
      examples: the largest number of pairs, or of single responses, in a row.
      sides: 2 for pairs, 1 for single responses.
      longest: at least the number of tokens of any sequence; what lies beyond is left out.
    """
    rows, length = segment_ids.shape
    own = segment_ids[:, :, None] == jnp.arange(1, PARTS * examples + 1)[None, None]
    count = jnp.sum(own, axis=1, dtype=jnp.int32)
    start = (jnp.cumsum(count, axis=1) - count).reshape(rows, examples, PARTS)
    common = count.reshape(rows, examples, PARTS)[..., :1]

    index = jnp.arange(longest)[None, None, None]
    of_rest = start[..., 1 : 1 + sides, None] + index - common[..., None]
    indices = jnp.where(index < common[..., None], start[..., :1, None] + index, of_rest)
    indices = jnp.clip(indices, 0, length - 1).reshape(rows, sides * examples, longest)

    part = jnp.maximum(segment_ids - 1, 0)
    example, part = part // PARTS, part % PARTS
    before = jnp.take_along_axis(common.reshape(rows, -1), example, axis=1)
    first = jnp.take_along_axis(start.reshape(rows, -1), PARTS * example + part, axis=1)
    at = jnp.arange(length)[None] - first + jnp.where(part > 0, before, 0)
    slot = (sides * example + (part == PARTS - 1)) * longest + at
    real = (segment_ids > 0) & (at < longest)
    slots = jnp.stack(
        [jnp.where(real, slot, -1), jnp.where(real & (part == 0), slot + longest, -1)], axis=-1
    )
    return Sequences(indices=indices, slots=slots)


def attend_apart(
    attend: Callable[[Array, Array, Array], Array],
    q: Float[Array, "rows length heads head_width"],
    k: Float[Array, "rows length kv_heads head_width"],
    v: Float[Array, "rows length kv_heads head_width"],
    sequences: Sequences,
) -> Float[Array, "rows length heads head_width"]:
    """Attention of each sequence to itself alone.

    Args:
      attend: causal attention of plain rows.
      q: queries.
      k: keys.
      v: values.
      sequences: of the packed rows.

    Returns:
      The mixed values of every token; anything at padding.
    """
    rows, count, longest = sequences.indices.shape

    def plain(x: Array) -> Array:
        return _apart(x, sequences).reshape(rows * count, longest, *x.shape[2:])

    mixed = attend(plain(q), plain(k), plain(v))
    return _together(mixed.reshape(rows, count * longest, *mixed.shape[2:]), sequences)


def _take(x: Array, index: Array) -> Array:
    """Elements of each row; 0 where the index is negative."""
    index = index.reshape(len(x), -1)
    taken = jax.vmap(lambda x, index: x[jnp.maximum(index, 0)])(x, index)
    there = (index >= 0).reshape(*index.shape, *[1] * (x.ndim - 2))
    return jnp.where(there, taken, 0)


@jax.custom_vjp
def _apart(x: Array, sequences: Sequences) -> Array:
    """[rows, length, ...] -> [rows, sequences longest, ...]."""
    return jax.vmap(lambda x, index: x[index])(x, sequences.indices.reshape(len(x), -1))


def _apart_fwd(x, sequences):
    return _apart(x, sequences), sequences


def _apart_bwd(sequences, dy):
    first, second = (_take(dy, sequences.slots[..., n]).astype(jnp.float32) for n in (0, 1))
    return (first + second).astype(dy.dtype), None


_apart.defvjp(_apart_fwd, _apart_bwd)


@jax.custom_vjp
def _together(y: Array, sequences: Sequences) -> Array:
    """[rows, sequences longest, ...] -> [rows, length, ...], each token from its first sequence."""
    return _take(y, sequences.slots[..., 0])


def _together_fwd(y, sequences):
    return _together(y, sequences), sequences


def _together_bwd(sequences, dx):
    indices = sequences.indices.reshape(len(dx), -1)
    first = jnp.take_along_axis(sequences.slots[..., 0], indices, axis=1)
    return _take(dx, jnp.where(first == jnp.arange(indices.shape[1])[None], indices, -1)), None


_together.defvjp(_together_fwd, _together_bwd)
