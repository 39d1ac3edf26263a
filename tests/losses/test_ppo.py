"""PPO's pieces against loops in float64, closed forms, and what padding may not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import (
    SampleLogProbs,
    gae,
    ppo_policy,
    ppo_token_rewards,
    ppo_value,
    whiten,
)

LENGTHS = np.array([6, 3, 1, 0])
MASK = np.arange(6) < LENGTHS[:, None]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def draw(rng):
    return lambda: rng.normal(size=MASK.shape)


def estimates_by_loops(rewards, values, lengths, gamma, lam):
    """The definition: advantages as discounted sums of temporal differences."""
    advantages = np.zeros_like(rewards)
    for row, length in enumerate(lengths):
        v = np.append(values[row, :length], 0.0)
        delta = rewards[row, :length] + gamma * v[1:] - v[:-1]
        for n in range(length):
            advantages[row, n] = sum((gamma * lam) ** (k - n) * delta[k] for k in range(n, length))
    return advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 0.0), (0.0, 0.95)])
def test_gae_is_its_definition(gamma, lam, draw):
    rewards, values = draw(), draw()
    found, returns = gae(
        jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(MASK), gamma=gamma, lam=lam
    )
    expected = estimates_by_loops(rewards, values, LENGTHS, gamma, lam)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(returns, np.where(MASK, expected + values, 0), atol=1e-12)


def test_gae_with_lambda_1_is_the_sum_of_what_follows_less_the_value(draw):
    rewards, values = np.where(MASK, draw(), 0), draw()
    _, returns = gae(jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(MASK), lam=1.0)
    np.testing.assert_allclose(returns, np.where(MASK, rewards[:, ::-1].cumsum(1)[:, ::-1], 0))


def test_gae_steps_over_holes_and_padding_on_the_left(draw):
    """Real tokens with gaps between them have the estimates that they have side by side."""
    rewards, values = draw()[:, :4], draw()[:, :4]
    places = np.array([1, 2, 5, 7])
    mask = np.isin(np.arange(9), places)[None].repeat(4, 0)
    wide = [np.full((4, 9), np.nan) for _ in range(2)]
    wide[0][:, places], wide[1][:, places] = rewards, values
    found, _ = gae(*map(jnp.asarray, wide), jnp.asarray(mask))
    close, _ = gae(jnp.asarray(rewards), jnp.asarray(values), jnp.ones((4, 4), bool))
    np.testing.assert_allclose(found[:, places], close)
    assert np.all(found[~mask] == 0)


def test_token_rewards_are_the_divergence_and_the_score_at_the_end(draw):
    log_prob, reference = draw(), draw()
    samples = SampleLogProbs(
        log_prob=jnp.asarray(np.where(MASK, log_prob, -np.inf)),
        reference=jnp.asarray(np.where(MASK, reference, np.nan)),
        mask=jnp.asarray(MASK),
    )
    score = np.array([2.0, -1.0, 0.5, 9.0])
    expected = np.where(MASK, -0.3 * (log_prob - reference), 0)
    expected[[0, 1, 2], [5, 2, 0]] += score[:3]
    found = ppo_token_rewards(samples, jnp.asarray(score), beta=0.3)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_whitening_is_over_real_tokens_alone(draw):
    x = draw()
    found = np.asarray(whiten(jnp.asarray(np.where(MASK, x, np.nan)), jnp.asarray(MASK)))
    np.testing.assert_allclose(found[MASK], (x[MASK] - x[MASK].mean()) / x[MASK].std(), rtol=1e-6)
    assert np.all(found[~MASK] == 0)
    assert np.all(whiten(jnp.asarray(x), jnp.zeros(MASK.shape, bool)) == 0)


def test_at_ratio_1_the_policy_loss_is_the_policy_gradient(draw):
    log_prob, advantages = jnp.asarray(-np.exp(draw())), jnp.asarray(draw())
    mask = jnp.asarray(MASK)

    def total(x):
        return ppo_policy(x, log_prob, advantages, mask).sum()

    minus = np.where(MASK, -np.asarray(advantages), 0)
    np.testing.assert_allclose(ppo_policy(log_prob, log_prob, advantages, mask), minus)
    np.testing.assert_allclose(jax.grad(total)(log_prob), minus)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 2.0, -2.4, 0.0),  # a gain beyond the clip is not followed
        (1.5, -2.0, 3.0, 3.0),  # a harm beyond it is
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),
        (1.1, 2.0, -2.2, -2.2),
    ],
)
def test_the_clip_is_pessimistic(ratio, advantage, loss, slope):
    old, one = jnp.array([[-3.0]]), jnp.ones((1, 1), bool)

    def total(x):
        return ppo_policy(x, old, jnp.array([[advantage]]), one).sum()

    found, slopes = jax.value_and_grad(total)(old + np.log(ratio))
    np.testing.assert_allclose(found, loss, rtol=1e-12)
    np.testing.assert_allclose(slopes, slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("value", "loss", "slope"),
    [
        (0.1, 0.5 * 0.9**2, -0.9),  # within the clip: the squared error
        (0.5, 0.5 * 0.8**2, 0.0),  # towards the return beyond the clip: not followed
        (-0.5, 0.5 * 1.5**2, -1.5),  # away from it: it is
    ],
)
def test_the_value_loss_in_closed_form(value, loss, slope):
    zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))

    def total(x):
        return ppo_value(x, zero, one, jnp.ones((1, 1), bool)).sum()

    found, slopes = jax.value_and_grad(total)(jnp.array([[value]]))
    np.testing.assert_allclose(found, loss, rtol=1e-12)
    np.testing.assert_allclose(slopes, slope, rtol=1e-12)


def test_padding_is_not_read(draw):
    spoilt = [jnp.asarray(np.where(MASK, draw(), np.nan)) for _ in range(4)]
    log_prob, old, advantages, returns = spoilt
    mask = jnp.asarray(MASK)

    def total(log_prob, values):
        return (
            ppo_policy(log_prob, old, advantages, mask) + ppo_value(values, old, returns, mask)
        ).sum()

    assert np.isfinite(total(log_prob, old))
    for slope in jax.grad(total, argnums=(0, 1))(log_prob, old):
        assert np.all(np.isfinite(slope))
        assert np.all(slope[~MASK] == 0)


def test_no_gradient_flows_into_what_was_recorded(draw):
    log_prob, old, advantages, returns = (jnp.asarray(draw()) for _ in range(4))
    mask = jnp.asarray(MASK)

    def total(old, advantages, returns):
        losses = ppo_policy(log_prob, old, advantages, mask)
        return (losses + ppo_value(log_prob, old, returns, mask)).sum()

    slopes = jax.grad(total, argnums=(0, 1, 2))(old, advantages, returns)
    assert all(np.all(slope == 0) for slope in slopes)
