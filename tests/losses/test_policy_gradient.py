"""Policy gradients by exact enumeration of a language model of two tokens, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.losses import (
    SampleLogProbs,
    leave_one_out,
    nash_md_pg,
    regularised_policy_gradient,
)

SYMBOLS, TAU = 3, 0.4
FIRST, SECOND = (x.ravel() for x in np.indices((SYMBOLS, SYMBOLS)))  # all nine responses
MASK = jnp.ones((SYMBOLS**2, 2), bool)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def log_probs(logits):
    """Log-probs of both tokens of every response: logits [symbols] and [symbols, symbols]."""
    first, second = jax.nn.log_softmax(logits[0]), jax.nn.log_softmax(logits[1])
    return jnp.stack([first[FIRST], second[FIRST, SECOND]], axis=-1)


@pytest.fixture
def world(rng):
    """Logits of policy and reference, and a reward of each response."""

    def logits():
        return jnp.asarray(rng.normal(size=3)), jnp.asarray(rng.normal(size=(3, 3)))

    return logits(), logits(), jnp.asarray(rng.uniform(size=9))


def objective(logits, reference, reward):
    """Expected reward less tau times the divergence from the reference."""
    rows = log_probs(logits).sum(-1)
    return jnp.sum(jnp.exp(rows) * (reward - TAU * (rows - log_probs(reference).sum(-1))))


def expected_gradient(surrogate, logits, reference):
    """Minus the gradient of a surrogate, averaged over all responses with their probabilities."""
    probabilities = jax.lax.stop_gradient(jnp.exp(log_probs(logits).sum(-1)))

    def loss(logits):
        samples = SampleLogProbs(
            log_prob=log_probs(logits), reference=log_probs(reference), mask=MASK
        )
        return -jnp.sum(probabilities * surrogate(samples))

    return flat(jax.grad(loss)(logits))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def by_differences(logits, reference, reward, step=1e-6):
    leaves, shape = jax.tree.flatten(logits)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def at(x):
        parts = [
            jnp.asarray(p).reshape(leaf.shape)
            for p, leaf in zip(np.split(x, ends), leaves, strict=True)
        ]
        return float(objective(jax.tree.unflatten(shape, parts), reference, reward))

    x = flat(logits)
    return np.array([(at(x + d) - at(x - d)) / (2 * step) for d in step * np.eye(len(x))])


def test_reward_to_go_and_whole_sequence_are_the_gradient_and_own_ratios_are_not(world):
    logits, reference, reward = world
    exact = by_differences(logits, reference, reward)

    def whole(samples):
        weight = reward - TAU * samples.log_ratio.sum(-1)
        return -jax.lax.stop_gradient(weight) * samples.scored.sum(-1)

    def own(samples):
        weight = reward[:, None] - TAU * samples.log_ratio
        return -jnp.sum(jax.lax.stop_gradient(weight) * samples.scored, axis=-1)

    def differentiated(samples):  # the divergence as a loss: its gradient is zero on average
        plain = regularised_policy_gradient(samples, reward, 0 * reward, tau=0.0)
        return plain + TAU * samples.log_ratio.sum(-1)

    def ours(samples):
        return regularised_policy_gradient(samples, reward, 0 * reward, tau=TAU)

    for right in (ours, whole):
        found = expected_gradient(right, logits, reference)
        np.testing.assert_allclose(found, exact, atol=1e-9)
    for wrong in (own, differentiated):
        found = expected_gradient(wrong, logits, reference)
        assert np.linalg.norm(found - exact) > 0.05 * np.linalg.norm(exact)


def test_reward_to_go_has_less_variance_than_the_whole_sequence(world):
    logits, reference, _ = world
    probabilities = np.exp(log_probs(logits).sum(-1))

    def second_moment(weight):
        def rows(logits):
            return jnp.sum(weight * log_probs(logits), axis=-1)

        each = jax.jacrev(rows)(logits)
        rows = np.concatenate([np.reshape(x, (9, -1)) for x in jax.tree.leaves(each)], axis=-1)
        return probabilities @ np.sum(rows**2, axis=-1)

    ratios = log_probs(logits) - log_probs(reference)
    to_go = jnp.stack([ratios.sum(-1), ratios[:, 1]], axis=-1)
    whole = jnp.broadcast_to(ratios.sum(-1, keepdims=True), (9, 2))
    assert second_moment(to_go) < second_moment(whole)


def test_a_baseline_leaves_the_expectation_alone(world):
    logits, reference, reward = world
    shifted = expected_gradient(
        lambda s: regularised_policy_gradient(s, reward, 5 + 0 * reward, tau=TAU), logits, reference
    )
    np.testing.assert_allclose(shifted, by_differences(logits, reference, reward), atol=1e-9)


def test_nash_md_pg_is_the_gradient_against_a_fixed_opponent(world, rng):
    logits, reference, _ = world
    upper = np.triu(rng.uniform(size=(9, 9)), 1)
    preferences = upper + np.tril(1 - upper.T, -1) + np.eye(9) / 2
    opponent = jnp.asarray(rng.dirichlet(np.ones(9)))
    wins = jnp.asarray(preferences) @ opponent
    exact = by_differences(logits, reference, wins)
    # every response against every opponent, and against the mean opponent: linear in preferences
    each = sum(
        opponent[j]
        * expected_gradient(
            lambda s, j=j: nash_md_pg(s, jnp.asarray(preferences[:, j]), tau=TAU), logits, reference
        )
        for j in range(9)
    )
    np.testing.assert_allclose(each, exact, atol=1e-9)


def test_padding_is_not_read(rng):
    log_prob, reference = (jnp.asarray(-rng.gamma(2.0, size=(4, 6))) for _ in range(2))
    mask = jnp.asarray(np.arange(6) < np.array([6, 3, 1, 0])[:, None])
    spoilt = SampleLogProbs(
        log_prob=jnp.where(mask, log_prob, -jnp.inf),
        reference=jnp.where(mask, reference, jnp.nan),
        mask=mask,
    )
    preference = jnp.array([0.9, 0.2, 0.5, 0.7])

    def total(log_prob):
        return nash_md_pg(
            SampleLogProbs(log_prob=log_prob, reference=spoilt.reference, mask=mask), preference
        ).sum()

    assert np.all(np.isfinite(jax.grad(total)(spoilt.log_prob)))
    short = SampleLogProbs(log_prob=log_prob[:, :3], reference=reference[:, :3], mask=mask[:, :3])
    np.testing.assert_allclose(
        nash_md_pg(spoilt, preference)[1:], nash_md_pg(short, preference)[1:]
    )
    assert nash_md_pg(spoilt, preference)[3] == 0


def test_leave_one_out_is_the_mean_of_the_others(rng):
    rewards = rng.normal(size=(5, 4))
    expected = np.stack([np.delete(rewards, k, axis=1).mean(axis=1) for k in range(4)], axis=1)
    np.testing.assert_allclose(leave_one_out(jnp.asarray(rewards)), expected)
    with pytest.raises(UserError, match="2 or more"):
        leave_one_out(jnp.zeros((5, 1)))
