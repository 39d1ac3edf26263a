"""Losses under labels that are probabilities: closed forms, and what they share with hard ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import (
    BATCH_COUPLED,
    PREFERENCE_LOSSES,
    PairLogProbs,
    dpo,
    ipo,
    slic_norm,
    soft_label,
    sppo,
    sppo_soft,
    xpo,
)

alone = sorted(set(PREFERENCE_LOSSES) - BATCH_COUPLED)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def pairs(rng):
    def log_probs():
        return jnp.asarray(-rng.gamma(4.0, 3.0, size=9))

    def lengths():
        return jnp.asarray(rng.integers(1, 30, size=9))

    return PairLogProbs(
        chosen=log_probs(),
        rejected=log_probs(),
        reference_chosen=log_probs(),
        reference_rejected=log_probs(),
        chosen_length=lengths(),
        rejected_length=lengths(),
    )


@pytest.fixture
def preference(rng):
    return jnp.asarray(rng.uniform(size=9))


def test_swapping_turns_every_field_and_twice_is_nothing(pairs):
    np.testing.assert_array_equal(pairs.swapped.margin, -pairs.margin)
    np.testing.assert_array_equal(pairs.swapped.chosen_mean, pairs.rejected_mean)
    np.testing.assert_array_equal(pairs.swapped.rejected_tokens, pairs.chosen_tokens)
    back = pairs.swapped.swapped
    assert all(map(np.array_equal, jax.tree.leaves(back), jax.tree.leaves(pairs)))


@pytest.mark.parametrize("name", alone)
def test_hard_labels_are_the_loss_itself(name, pairs):
    loss, one = PREFERENCE_LOSSES[name], jnp.ones(9)
    np.testing.assert_allclose(soft_label(loss, pairs, one), loss(pairs))
    np.testing.assert_allclose(soft_label(loss, pairs, 0 * one), loss(pairs.swapped))


@pytest.mark.parametrize("tau", [0.1, 1.0, 3.0])
def test_soft_ipo_is_a_regression_on_the_preference(tau, pairs, preference):
    h, p = np.asarray(pairs.margin), np.asarray(preference)
    square = (h - (p - 0.5) / tau) ** 2
    constant = (0.25 - (p - 0.5) ** 2) / tau**2
    found = soft_label(ipo, pairs, preference, tau=tau)
    np.testing.assert_allclose(found, square + constant, rtol=1e-12)


def test_the_square_is_the_published_implementation_over_tau(pairs, preference):
    """Tau times the square is tau h^2 less the gap weighed by the label, and a constant."""
    tau, h, p = 0.3, np.asarray(pairs.margin), np.asarray(preference)
    implementation = tau * h**2 - (2 * p - 1) * h
    found = tau * np.asarray(soft_label(ipo, pairs, preference, tau=tau))
    np.testing.assert_allclose(found - implementation, 1 / (4 * tau), rtol=1e-12)


def test_soft_dpo_and_slic_in_closed_form(pairs, preference):
    h, p, b = np.asarray(pairs.margin), np.asarray(preference), 0.3
    logistic = p * np.log1p(np.exp(-b * h)) + (1 - p) * np.log1p(np.exp(b * h))
    np.testing.assert_allclose(soft_label(dpo, pairs, preference, beta=b), logistic, rtol=1e-12)
    hinge = p * np.maximum(0, 1 - b * h) + (1 - p) * np.maximum(0, 1 + b * h)
    np.testing.assert_allclose(soft_label(slic_norm, pairs, preference, beta=b), hinge, rtol=1e-12)


def test_the_mean_over_drawn_labels_is_the_soft_label(pairs, preference, rng):
    drawn = jnp.asarray(rng.uniform(size=(20_000, 9)) < np.asarray(preference), float)
    each = np.asarray(jax.vmap(partial(soft_label, ipo, pairs))(drawn))
    error = each.std(axis=0) / np.sqrt(len(drawn))
    expected = soft_label(ipo, pairs, preference)
    assert np.all(np.abs(each.mean(axis=0) - expected) < 5 * np.maximum(error, 1e-9))


def test_exchanging_the_responses_exchanges_the_label(pairs, preference):
    np.testing.assert_allclose(
        soft_label(dpo, pairs.swapped, 1 - preference), soft_label(dpo, pairs, preference)
    )


def test_xpo_is_online_dpo_and_a_push_on_the_reference_sample(pairs, preference):
    online = soft_label(dpo, pairs, preference, beta=0.2)
    np.testing.assert_array_equal(xpo(pairs, preference, beta=0.2, alpha=0.0), online)
    found = xpo(pairs, preference, beta=0.2, alpha=0.3)
    np.testing.assert_allclose(found - online, 0.3 * pairs.rejected)

    def total(pairs, alpha):
        return xpo(pairs, preference, alpha=alpha).sum()

    slopes = [jax.grad(total, allow_int=True)(pairs, alpha) for alpha in (0.0, 0.3)]
    np.testing.assert_allclose(slopes[1].rejected - slopes[0].rejected, 0.3)
    np.testing.assert_array_equal(slopes[1].chosen, slopes[0].chosen)


def test_sppo_with_win_rates(pairs, preference):
    one = jnp.ones(9)
    np.testing.assert_allclose(sppo_soft(pairs, one, 0 * one, beta=0.1), sppo(pairs, beta=0.1))
    targets = (np.asarray(preference) - 0.5) / 0.1, (0.25 - 0.5) / 0.1
    expected = (pairs.chosen_log_ratio - targets[0]) ** 2
    expected += (pairs.rejected_log_ratio - targets[1]) ** 2
    np.testing.assert_allclose(sppo_soft(pairs, preference, 0.25 * one, beta=0.1), expected)
