"""Stable Alignment's loss of several rated responses, on the specification's example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import PairLogProbs, stable_alignment, stable_alignment_rated


def test_each_response_has_its_own_margin():
    # ratings [1, 7, 4]: margins of the others 6 and 3 of 7, times 10 (the released code: 6 and 0)
    nll = jnp.array([[2.0, 1.0, 3.0]])
    rating = jnp.array([[1.0, 7.0, 4.0]])
    found = stable_alignment_rated(nll, rating)
    expected = 1.0 + 0.2 * (((1 - 2) + 60 / 7) + ((1 - 3) + 30 / 7)) / 2
    assert float(found[0]) == pytest.approx(expected, abs=1e-6)
    order = jnp.array([2, 0, 1])
    moved = stable_alignment_rated(nll[:, order], rating[:, order])
    assert float(moved[0]) == pytest.approx(expected, abs=1e-6)
    far = stable_alignment_rated(nll + jnp.array([[99.0, 0.0, 99.0]]), rating)
    assert float(far[0]) == 1.0  # the best response's loss alone
    slope = jax.grad(lambda x: stable_alignment_rated(x, rating).sum())(nll)[0]
    assert slope.tolist() == pytest.approx([-0.1, 1.2, -0.1])


def test_two_responses_are_a_pair(rng):
    chosen, rejected = (jnp.asarray(-rng.gamma(4.0, 3.0, 20), jnp.float32) for _ in range(2))
    lengths = [jnp.asarray(rng.integers(1, 30, 20), jnp.int32) for _ in range(2)]
    gap = jnp.asarray(rng.integers(0, 7, 20), jnp.float32)
    pairs = PairLogProbs(
        chosen=chosen,
        rejected=rejected,
        reference_chosen=chosen,
        reference_rejected=rejected,
        chosen_length=lengths[0],
        rejected_length=lengths[1],
    )
    nll = -jnp.stack([chosen, rejected], 1) / jnp.stack(lengths, 1).astype(jnp.float32)
    rated = stable_alignment_rated(nll, jnp.stack([1 + gap, jnp.ones(20)], 1), margin=1.0)
    np.testing.assert_allclose(stable_alignment(pairs, gap=gap, margin=1.0), rated, rtol=1e-5)
