"""Losses on hidden states against float64 NumPy written out position by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxalign.losses import hidden_state_distance, hidden_state_matching, shifted_states

SHAPE = 3, 2, 5, 4  # rows, layers, positions, width
LENGTHS = np.array([5, 2, 0])


@pytest.fixture
def drawn(rng):
    return [rng.normal(size=SHAPE) for _ in range(4)]


def mask():
    return jnp.asarray(np.arange(SHAPE[2])[None] < LENGTHS[:, None])


def written_out(states, target, power):
    """Row by row, layer by layer, position by position."""
    rows = []
    for row, length in enumerate(LENGTHS):
        total = 0.0
        for layer in range(SHAPE[1]):
            for position in range(length):
                gap = states[row, layer, position] - target[row, layer, position]
                total += np.sqrt(gap @ gap) ** power / SHAPE[1]
        rows.append(total)
    return np.array(rows)


@pytest.mark.parametrize(
    ("loss", "power"), [(hidden_state_matching, 2), (hidden_state_distance, 1)]
)
def test_value_and_gradient(loss, power, drawn):
    states, base, positive, negative = drawn
    target = base + 5.0 * (positive - negative)
    with jax.enable_x64(True):
        found = shifted_states(jnp.asarray(base), jnp.asarray(positive - negative), alpha=5.0)
        np.testing.assert_allclose(found, target, rtol=1e-12)
        value = loss(jnp.asarray(states), found, mask())
        np.testing.assert_allclose(value, written_out(states, target, power), rtol=1e-12)

        def total(states):
            return loss(jnp.asarray(states), found, mask()).sum()

        check_grads(total, (jnp.asarray(states),), order=1, modes=["rev"], rtol=1e-6)


@pytest.mark.parametrize("loss", [hidden_state_matching, hidden_state_distance])
def test_padding_is_not_read(loss, drawn):
    states, target = (jnp.asarray(x, jnp.float32) for x in drawn[:2])
    hole = jnp.where(mask()[:, None, :, None], states, jnp.nan)
    np.testing.assert_allclose(loss(hole, target, mask()), loss(states, target, mask()), rtol=1e-6)


@pytest.mark.parametrize("loss", [hidden_state_matching, hidden_state_distance])
def test_on_target_value_and_gradient_are_zero(loss, drawn):
    states = jnp.asarray(drawn[0], jnp.float32)
    value, slope = jax.value_and_grad(lambda h: loss(h, states, mask()).sum())(states)
    assert value == 0
    np.testing.assert_array_equal(slope, 0)
