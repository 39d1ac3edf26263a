"""Masks: the oracle against a table filled in by hand, learned weights against the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.entanglement.masks import START, differing_tokens, initial_head, token_weights


def longest(a, b):
    """Length of the longest common subsequence, by its recursion."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = (
                table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
            )
    return table[-1, -1]


def padded(*responses, room=9):
    tokens = np.zeros((len(responses), room), np.int32)
    for row, response in zip(tokens, responses, strict=True):
        row[: len(response)] = response
    return tokens, np.array([len(x) for x in responses], np.int32)


def test_what_is_left_out_is_a_longest_common_subsequence(rng):
    pairs = [[rng.integers(0, 4, size=n) for n in rng.integers(0, 10, size=2)] for _ in range(60)]
    tokens, lengths = zip(*(padded(*pair) for pair in pairs), strict=True)
    masks = np.asarray(jax.jit(differing_tokens)(np.stack(tokens), np.stack(lengths)))
    for (chosen, rejected), mask in zip(pairs, masks, strict=True):
        shared = [side[mask[at, : len(side)] == 0] for at, side in enumerate((chosen, rejected))]
        np.testing.assert_array_equal(*shared)
        assert len(shared[0]) == longest(chosen, rejected)
        assert not mask[0, len(chosen) :].any()
        assert not mask[1, len(rejected) :].any()


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ([5, 1, 2, 3], [6, 1, 2, 3], ([1, 0, 0, 0], [1, 0, 0, 0])),
        ([1, 2, 3], [1, 2, 3], ([0, 0, 0], [0, 0, 0])),
        ([1, 2], [2, 1], ([0, 1], [1, 0])),
        ([1, 7, 2], [1, 2], ([0, 1, 0], [0, 0])),
        ([], [4, 4], ([], [1, 1])),
    ],
    ids=["first differs", "same", "swapped", "inserted", "empty"],
)
def test_known_pairs(chosen, rejected, expected):
    tokens, lengths = padded(chosen, rejected)
    mask = differing_tokens(tokens[None], lengths[None])[0]
    for side, kept in enumerate(expected):
        np.testing.assert_array_equal(mask[side, : len(kept)], kept)


def test_learned_weights(rng):
    head = initial_head(4, 6)
    states = rng.normal(size=(2, 3, 4)).astype(np.float32)
    tokens = rng.integers(0, 6, size=(2, 3))
    np.testing.assert_allclose(token_weights(head, states, tokens), 1 / (1 + np.exp(-START)), 1e-6)
    head = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), head)
    unit = states / np.linalg.norm(states, axis=-1, keepdims=True)
    logits = unit @ head["state"] + np.asarray(head["token"])[tokens] + head["offset"]
    found = token_weights(head, states, tokens)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits)), rtol=1e-4)
    scaled = token_weights(head, 100 * states, tokens)  # the size of a state does not matter
    np.testing.assert_allclose(scaled, found, rtol=1e-4)
