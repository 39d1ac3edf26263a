"""Reward-model and preference-model losses: closed forms, slopes, what centring and margin do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import bradley_terry, preference_model

CHOSEN = jnp.array([1.5, -0.3, 4.0, 0.0])
REJECTED = jnp.array([0.5, 0.7, -2.0, 0.0])


def test_bradley_terry_in_closed_form():
    r, s = np.asarray(CHOSEN, float), np.asarray(REJECTED, float)
    expected = np.log1p(np.exp(-(r - s - 0.4))) + 0.05 * (r + s) ** 2
    found = bradley_terry(CHOSEN, REJECTED, margin=0.4, centering=0.05)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(bradley_terry(CHOSEN, REJECTED)[3], np.log(2), rtol=1e-6)


def test_a_margin_of_its_own_for_each_pair():
    margin = jnp.array([0.0, 1.0, 2.0, 3.0])
    found = bradley_terry(CHOSEN, REJECTED, margin=margin)
    np.testing.assert_allclose(found, bradley_terry(CHOSEN - margin, REJECTED), rtol=1e-6)


def test_the_likelihood_leaves_the_level_free_and_centring_does_not():
    np.testing.assert_allclose(
        bradley_terry(CHOSEN + 7, REJECTED + 7), bradley_terry(CHOSEN, REJECTED), rtol=1e-5
    )

    def level(shift):
        return bradley_terry(CHOSEN + shift, REJECTED + shift, centering=0.01).sum()

    best = -float((CHOSEN + REJECTED).mean()) / 2
    np.testing.assert_allclose(jax.grad(level)(best), 0, atol=1e-6)
    assert level(best + 1) > level(best)


def test_slope_of_bradley_terry_is_the_probability_of_being_wrong():
    slope = jax.grad(lambda r: bradley_terry(r, REJECTED).sum())(CHOSEN)
    np.testing.assert_allclose(slope, -1 / (1 + np.exp(CHOSEN - REJECTED)), rtol=1e-5)


def test_preference_model_is_cross_entropy_with_a_soft_label():
    z, p = np.array([-3.0, 0.0, 0.5, 8.0]), np.array([0.0, 0.3, 0.9, 1.0])
    q = 1 / (1 + np.exp(-z))
    expected = -p * np.log(q) - (1 - p) * np.log(1 - q)
    found = preference_model(jnp.asarray(z, jnp.float32), jnp.asarray(p, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_slope_of_the_preference_model_is_its_error():
    z, p = jnp.array([-1e4, -3.0, 0.0, 1e4]), jnp.array([0.2, 0.5, 0.9, 0.7])
    slope = jax.grad(lambda z: preference_model(z, p).sum())(z)
    np.testing.assert_allclose(slope, jax.nn.sigmoid(z) - p, rtol=1e-6)


def test_exchanging_the_responses_exchanges_the_label():
    z, p = jnp.array([-2.0, 0.3]), jnp.array([0.2, 0.9])
    np.testing.assert_allclose(preference_model(z, p), preference_model(-z, 1 - p), rtol=1e-6)


def test_extremes_stay_finite():
    far = jnp.array([1e4, -1e4])
    np.testing.assert_allclose(bradley_terry(far, -far), [0.0, 2e4])
    np.testing.assert_allclose(preference_model(far, jnp.ones(2)), [0.0, 1e4])


def test_a_negative_centring_is_refused():
    with pytest.raises(ValueError, match=r"centering = -1\.0: must be >= 0"):
        bradley_terry(CHOSEN, REJECTED, centering=-1.0)
