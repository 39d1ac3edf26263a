"""log(1 - e^x) and log-odds against extended precision, where naive forms lose every digit."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.losses.log_arithmetic import log1mexp, log_odds

X = np.array([-1e-30, -1e-7, -1e-3, -0.3, -0.6931, -0.6932, -1.0, -30.0, -87.0, -1e4])


def test_log1mexp_keeps_relative_accuracy_in_float32():
    exact = np.log(-np.expm1(X.astype(np.longdouble)))
    np.testing.assert_allclose(log1mexp(jnp.asarray(X, jnp.float32)), exact, rtol=2e-6, atol=1e-37)


def test_slope_of_log1mexp_is_finite_and_right():
    slope = jax.vmap(jax.grad(log1mexp))(jnp.asarray(X, jnp.float32))
    exact = 1 / np.expm1(-X.astype(np.longdouble))  # -e^x / (1 - e^x)
    np.testing.assert_allclose(slope, -exact, rtol=2e-5, atol=1e-37)


def test_log_odds_of_a_probability():
    p = np.array([1e-6, 0.1, 0.5, 0.9, 0.999])
    odds = log_odds(jnp.asarray(np.log(p), jnp.float32))
    np.testing.assert_allclose(odds, np.log(p / (1 - p)), rtol=1e-4, atol=1e-6)


def test_log_odds_of_certainty_are_large_finite_and_flat():
    value, slope = jax.value_and_grad(log_odds)(jnp.float32(0.0))
    np.testing.assert_allclose(value, -np.log(np.finfo(np.float32).eps), rtol=1e-4)
    assert slope == 0
