"""Sequences of packed rows, taken apart and put together = the packed rows' attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.attention import attention
from jaxalign.models.sequences import attend_apart, sequences_of

PARTS = (
    ((3, 2, 4), (1, 0, 1), (2, 5, 0)),
    ((4, 1, 1), (5, 3, 2)),
)
"""Prefix, rest of chosen and rest of rejected of the pairs of two rows."""
LENGTH, PAIRS, LONGEST = 24, 3, 8


def packed_rows():
    """Segments, prefixes and positions, [2, LENGTH]; 0 at padding."""
    arrays = np.zeros((3, len(PARTS), LENGTH), np.int32)
    for row, pairs in enumerate(PARTS):
        at = 0
        for pair, sizes in enumerate(pairs):
            for part, size in enumerate(sizes):
                own, first = slice(at, at + size), 0 if part == 0 else sizes[0]
                arrays[0, row, own] = 3 * pair + part + 1
                arrays[1, row, own] = 3 * pair + 1
                arrays[2, row, own] = np.arange(first, first + size)
                at += size
    return jnp.asarray(arrays)


@pytest.mark.parametrize("window", [None, 3])
def test_sequences_apart_are_attention_with_prefixes(window, rng):
    segments, prefixes, positions = packed_rows()
    sequences = sequences_of(segments, PAIRS, 2, LONGEST)
    real = (segments > 0)[..., None, None]
    q, k, v, slope = (
        jnp.asarray(rng.normal(size=(2, LENGTH, heads, 8)), jnp.float32) for heads in (4, 2, 2, 4)
    )
    plain = functools.partial(attention, scale=0.4, window=window)

    def packed(q, k, v):
        seen = {"segment_ids": segments, "prefix_ids": prefixes, "positions": positions}
        return jnp.where(real, plain(q, k, v, **seen), 0)

    def apart(q, k, v):
        return jnp.where(real, attend_apart(plain, q, k, v, sequences), 0)

    expected, pull = jax.vjp(packed, q, k, v)
    result, pull_apart = jax.vjp(apart, q, k, v)
    np.testing.assert_allclose(result, expected, atol=2e-6)
    for own, other in zip(pull_apart(slope), pull(slope), strict=True):
        np.testing.assert_allclose(own, other, atol=5e-6)


def test_what_lies_beyond_the_longest_sequence_is_left_out():
    segments = jnp.asarray([[1, 1, 2, 3, 3, 3, 3]])  # joint rows: padding is in the last segment
    sequences = sequences_of(segments, 1, 2, 4)
    assert sequences.indices.tolist() == [[[0, 1, 2, 3], [0, 1, 3, 4]]]
    assert sequences.slots[0].tolist() == [
        [0, 4], [1, 5], [2, -1], [6, -1], [7, -1], [-1, -1], [-1, -1],
    ]  # fmt: skip


def test_single_responses_are_one_sequence_each():
    segments = jnp.asarray([[2, 2, 2, 5, 5, 0, 0]])
    sequences = sequences_of(segments, 2, 1, 3)
    assert sequences.indices.tolist() == [[[0, 1, 2], [3, 4, 5]]]
    assert sequences.slots[0, :, 0].tolist() == [0, 1, 2, 3, 4, -1, -1]
    assert (sequences.slots[..., 1] == -1).all()
