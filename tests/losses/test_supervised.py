"""Supervised losses: sums and counts, padding, micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import sft_sequence_sum, sft_token_mean

LOG_PROBS = np.log(np.array([[0.5, 0.25, 0.1, 0.9], [0.2, 0.4, 0.8, 0.3], [0.6, 0.7, 0.5, 0.1]]))
MASK = np.array([[1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 0, 0]])


@pytest.fixture
def log_probs():
    return jnp.asarray(LOG_PROBS, jnp.float32)


def test_sum_and_count(log_probs):
    total, count = sft_token_mean(log_probs, jnp.asarray(MASK))
    np.testing.assert_allclose(total, -np.log(0.5 * 0.25 * 0.4 * 0.8 * 0.3 * 0.6), rtol=1e-6)
    assert count == 6


def test_rows_are_weighted(log_probs):
    total, count = sft_token_mean(log_probs, jnp.asarray(MASK), jnp.array([1.0, 0.0, 0.5]))
    np.testing.assert_allclose(total, -np.log(0.5 * 0.25) - 0.5 * np.log(0.6), rtol=1e-6)
    np.testing.assert_allclose(count, 2.5)


def test_sequence_sum(log_probs):
    expected = [-np.log(0.5 * 0.25), -np.log(0.4 * 0.8 * 0.3), -np.log(0.6)]
    np.testing.assert_allclose(sft_sequence_sum(log_probs, jnp.asarray(MASK)), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.int32, jnp.float32])
def test_any_kind_of_mask(dtype, log_probs):
    total, count = sft_token_mean(log_probs, jnp.asarray(MASK, dtype))
    np.testing.assert_allclose(total, sft_sequence_sum(log_probs, jnp.asarray(MASK, dtype)).sum())
    assert count == 6


def test_uniform_costs_log_vocabulary():
    total, count = sft_token_mean(jnp.full((2, 5), -np.log(50257.0)), jnp.ones((2, 5), int))
    np.testing.assert_allclose(total / count, np.log(50257), rtol=1e-6)


def test_unequal_micro_batches_add_up_and_their_means_do_not(log_probs):
    mask = jnp.asarray(MASK)
    total, count = sft_token_mean(log_probs, mask)
    parts = [sft_token_mean(log_probs[part], mask[part]) for part in (slice(0, 1), slice(1, 3))]
    np.testing.assert_allclose(sum(t for t, _ in parts), total, rtol=1e-6)
    np.testing.assert_allclose(sum(n for _, n in parts), count)
    assert abs(np.mean([t / n for t, n in parts]) - total / count) > 0.01


def test_padding_may_hold_anything(log_probs):
    mask = jnp.asarray(MASK)
    dirty = jnp.where(mask == 1, log_probs, -jnp.inf)
    np.testing.assert_array_equal(sft_token_mean(dirty, mask), sft_token_mean(log_probs, mask))
    slope = jax.grad(lambda x: sft_token_mean(x, mask)[0])(dirty)
    np.testing.assert_array_equal(slope, -mask)


def test_an_empty_batch_counts_nothing(log_probs):
    total, count = sft_token_mean(log_probs, jnp.zeros((3, 4), int))
    assert (total, count) == (0, 0)
