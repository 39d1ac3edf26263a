"""CHES and its baselines, by hand and against the textbook recursion."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.entanglement import similarity
from jaxalign.models import decoder
from tests.entanglement.test_probing import pairs_for, small

HIDDEN = jnp.array([[[[1.0, 0.0], [0.0, 2.0]], [[3.0, 1.0], [0.0, 0.0]]]])  # sums (1, 2), (3, 1)
LENGTHS = jnp.array([[2, 1]])


def test_by_hand():
    np.testing.assert_allclose(similarity.ches(HIDDEN, LENGTHS), [5.0 - 5.0])
    np.testing.assert_allclose(similarity.ln_ches(HIDDEN, LENGTHS), [5.0 / 2 - 5.0 / 4])
    np.testing.assert_allclose(similarity.last_hidden_similarity(HIDDEN, LENGTHS), [2.0 * 1.0])


def test_the_states_are_those_that_predict_the_response():
    """From the prompt's last token to the last but one of the response; 0 behind it."""
    config = small(False)
    params = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
    batch = pairs_for(config.vocab_size)
    found = similarity.hidden_states_of_pairs(params, config, batch)
    rows = batch.tokens.reshape(6, -1)
    every = decoder.hidden_states(params, config, rows).reshape(3, 2, 9, -1)
    for pair in range(3):
        for side in range(2):
            real = int(batch.response_length[pair, side])
            wanted = every[pair, side, 3 : 3 + real]
            np.testing.assert_allclose(found[pair, side, :real], wanted, rtol=1e-5)
            assert not found[pair, side, real:].any()


def recursion(a, b):
    @functools.cache
    def distance(i, j):
        if i == 0 or j == 0:
            return i + j
        replaced = distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(replaced, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(a), len(b))


@pytest.mark.parametrize("seed", range(20))
def test_edit_distance_is_that_of_the_recursion(seed):
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(0, 4, rng.integers(1, 9)) for _ in range(2))
    wanted = -recursion(tuple(a), tuple(b)) / max(len(a), len(b))
    assert similarity.edit_similarity(a, b) == pytest.approx(wanted)
    assert similarity.edit_similarity(a, a) == 0.0
    assert similarity.edit_similarity(a, np.array([], int)) == -1.0
