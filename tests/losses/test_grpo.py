"""The GRPO family against TRL's trainer, closed forms, and DPO's gradient."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.losses import (
    PairLogProbs,
    SampleLogProbs,
    cispo,
    dapo,
    dpo,
    dr_grpo,
    group_advantages,
    grpo,
    gspo,
    k3_divergence,
    ppo_policy,
    regularised_policy_gradient,
    reinforce_pp_advantages,
)

TRL = json.loads((Path(__file__).parents[1] / "fixtures" / "trl_grpo.json").read_text())
LENGTHS = np.array([6, 3, 1, 0])
TOKENS = float(np.sum(TRL["mask"]))
MASK = np.arange(6) < LENGTHS[:, None]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def draw(rng):
    return lambda: rng.normal(size=MASK.shape)


def of_trl(name):
    return jnp.asarray(TRL[name])


def batch_loss(case, log_prob):
    """The batch's loss as the online step reduces it."""
    mask = of_trl("mask") > 0
    samples = SampleLogProbs(log_prob=log_prob, reference=of_trl("reference"), mask=mask)
    options = {"clip": case["epsilon_low"], "clip_high": case["epsilon_high"], "beta": case["beta"]}
    weights = of_trl("importance") if case["weighted"] else None
    arguments = (samples, of_trl("old"), of_trl("advantages"), weights)
    if case["name"] == "cispo":  # TRL's is the largest weight itself
        options = {"clip_high": case["epsilon_high"] - 1, "beta": case["beta"]}
        return cispo(*arguments, **options).sum() / TOKENS
    if case["name"] == "dapo":
        return dapo(*arguments, **options).sum() / TOKENS
    if case["name"] == "dr_grpo":
        options["max_tokens"] = mask.shape[1]
    function = {"grpo": grpo, "dr_grpo": dr_grpo, "gspo": gspo}[case["name"]]
    return function(*arguments, **options).mean()


@pytest.mark.parametrize("case", TRL["cases"], ids=lambda x: f"{x['name']}-{x['weighted']}")
def test_losses_and_gradients_are_those_of_trl(case):
    loss, gradient = jax.value_and_grad(lambda x: batch_loss(case, x))(of_trl("log_prob"))
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-9)
    np.testing.assert_allclose(gradient, case["gradient"], atol=1e-11)


def test_group_advantages_are_those_of_trl():
    found = group_advantages(of_trl("rewards"))
    np.testing.assert_allclose(found.ravel(), TRL["advantages"], rtol=1e-12)


def test_advantages_without_spread_are_zero_and_unscaled_ones_are_differences():
    rewards = jnp.array([[1.0, 1.0, 1.0], [0.0, 3.0, 0.0]])
    np.testing.assert_allclose(group_advantages(rewards)[0], 0)
    equal = jnp.full((1, 8), 1.3, jnp.float32)  # whose mean in float32 is another number
    np.testing.assert_array_equal(group_advantages(equal), 0)
    np.testing.assert_allclose(group_advantages(rewards, scaled=False)[1], [-1, 2, -1])
    np.testing.assert_allclose(  # a group of two: the sign, whatever the difference
        group_advantages(jnp.array([[0.3, 0.1], [-5.0, 7.0]]), epsilon=1e-12),
        np.array([[1, -1], [-1, 1]]) / np.sqrt(2),
        rtol=1e-9,
    )
    with pytest.raises(UserError, match="2 or more"):
        group_advantages(jnp.zeros((3, 1)))


def test_the_divergence_estimate_is_unbiased_and_not_negative(rng):
    """The mean over a distribution's symbols, weighed by their probabilities."""
    policy, reference = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
    samples = SampleLogProbs(
        log_prob=jnp.log(policy)[None],
        reference=jnp.log(reference)[None],
        mask=jnp.ones((1, 5), bool),
    )
    found = k3_divergence(samples)[0]
    assert (found >= 0).all()
    np.testing.assert_allclose(policy @ found, policy @ np.log(policy / reference))


@pytest.mark.parametrize("loss", [grpo, dr_grpo, dapo, gspo, cispo])
def test_at_the_policy_that_sampled_the_gradient_is_the_policy_gradient(loss, draw):
    log_prob, advantages = jnp.asarray(draw()), jnp.asarray([1.5, -0.5, 2.0, 1.0])
    options = {"max_tokens": 6} if loss is dr_grpo else {}

    def total(x):
        samples = SampleLogProbs(log_prob=x, reference=log_prob, mask=jnp.asarray(MASK))
        return loss(samples, log_prob, advantages, beta=0.3, **options).sum()

    scale = {grpo: np.maximum(LENGTHS, 1), gspo: np.maximum(LENGTHS, 1), dr_grpo: np.full(4, 6)}
    divided = np.asarray(advantages) / scale.get(loss, np.ones(4))
    expected = np.where(MASK, -divided[:, None], 0)  # k3 has no slope where both policies agree
    np.testing.assert_allclose(jax.grad(total)(log_prob), expected, atol=1e-12)


@pytest.mark.parametrize("scaled", [True, False])
def test_groups_of_two_have_the_direction_of_dpos_gradient(scaled, rng):
    """2-GRPO (arXiv:2510.00977): better less worse response, as in DPO; only the scale differs."""
    log_prob, reference = (jnp.asarray(-rng.gamma(1.0, size=(2, 6))) for _ in range(2))
    lengths = jnp.array([5, 3])
    mask = jnp.arange(6)[None] < lengths[:, None]
    rewards = jnp.array([[0.9, 0.2]])

    def sums(x):
        return jnp.where(mask, x, 0).sum(-1)

    def of_dpo(x):
        ours, theirs = sums(x), sums(reference)
        pairs = PairLogProbs(
            chosen=ours[:1],
            rejected=ours[1:],
            reference_chosen=theirs[:1],
            reference_rejected=theirs[1:],
            chosen_length=lengths[:1],
            rejected_length=lengths[1:],
        )
        return dpo(pairs, beta=0.5).sum()

    def of_grpo(x):
        samples = SampleLogProbs(log_prob=x, reference=reference, mask=mask)
        advantages = group_advantages(rewards, scaled=scaled)[0]
        return dr_grpo(samples, log_prob, advantages, max_tokens=6).mean()

    one, other = (np.ravel(jax.grad(f)(log_prob)) for f in (of_dpo, of_grpo))
    assert one @ other == pytest.approx(np.linalg.norm(one) * np.linalg.norm(other), rel=1e-12)
    if scaled:  # 2-GRPO's weight is a constant; DPO's falls as the margin grows
        np.testing.assert_allclose(np.abs(other[other != 0]), 1 / np.sqrt(2) / 2 / 6, rtol=1e-3)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.25, 2.0, -2.5, -2.5),  # within the higher clip
        (1.5, 2.0, -2.56, 0.0),
        (0.7, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_dapo_clips_higher_above(ratio, advantage, loss, slope):
    old, one = jnp.array([[-3.0]]), jnp.ones((1, 1), bool)

    def total(x):
        samples = SampleLogProbs(log_prob=x, reference=old, mask=one)
        return dapo(samples, old, jnp.array([advantage])).sum()

    found, slopes = jax.value_and_grad(total)(old + np.log(ratio))
    np.testing.assert_allclose(found, loss, rtol=1e-12)
    np.testing.assert_allclose(slopes, slope, rtol=1e-12, atol=1e-12)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    old, one = jnp.array([[-3.0]]), jnp.ones((1, 1), bool)

    def total(x):
        samples = SampleLogProbs(log_prob=x, reference=old, mask=one)
        return cispo(samples, old, jnp.array([2.0]), clip_high=0.5).sum()

    np.testing.assert_allclose(jax.grad(total)(old + np.log(1.2)), -2.4)
    np.testing.assert_allclose(jax.grad(total)(old + np.log(8.0)), -3.0)


def test_reinforce_pp_whitens_what_follows_each_token(draw):
    log_prob, reference, reward = draw(), draw(), np.array([1.0, -2.0, 0.5, 9.0])
    samples = SampleLogProbs(
        log_prob=jnp.asarray(np.where(MASK, log_prob, -np.inf)),
        reference=jnp.asarray(np.where(MASK, reference, np.nan)),
        mask=jnp.asarray(MASK),
    )
    ratio = np.where(MASK, log_prob - reference, 0)
    follows = np.where(MASK, reward[:, None] - 0.2 * ratio[:, ::-1].cumsum(1)[:, ::-1], 0)
    expected = np.where(MASK, (follows - follows[MASK].mean()) / follows[MASK].std(), 0)
    found = reinforce_pp_advantages(samples, jnp.asarray(reward), beta=0.2)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # on policy, and before whitening, it is the regularised policy gradient
    mask = jnp.asarray(MASK)

    def clipped(x):
        return ppo_policy(x, samples.log_prob, jnp.asarray(follows), mask).sum()

    def plain(x):
        own = SampleLogProbs(log_prob=x, reference=samples.reference, mask=mask)
        return regularised_policy_gradient(own, jnp.asarray(reward), jnp.zeros(4), tau=0.2).sum()

    one, other = (jax.grad(f)(samples.log_prob) for f in (clipped, plain))
    np.testing.assert_allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("loss", [grpo, dr_grpo, dapo, gspo, cispo])
def test_padding_is_not_read_and_no_gradient_flows_into_what_was_recorded(loss, draw):
    log_prob, old, reference, importance = (
        jnp.asarray(np.where(MASK, draw(), np.nan)) for _ in range(4)
    )
    options = {"max_tokens": 6} if loss is dr_grpo else {}
    advantages = jnp.array([1.0, -1.0, 0.5, 2.0])

    def total(log_prob, old, advantages, importance):
        samples = SampleLogProbs(log_prob=log_prob, reference=reference, mask=jnp.asarray(MASK))
        return loss(samples, old, advantages, importance, beta=0.1, **options).sum()

    arguments = (log_prob, old, advantages, importance)
    slopes = jax.grad(total, argnums=(0, 1, 2, 3))(*arguments)
    assert np.isfinite(total(*arguments))
    assert np.all(np.isfinite(slopes[0]))
    assert np.all(slopes[0][~MASK] == 0)
    assert all(np.all(slope == 0) for slope in slopes[1:])


def test_hyperparameters_out_of_range_are_named():
    zero = jnp.zeros((1, 1))
    samples = SampleLogProbs(log_prob=zero, reference=zero, mask=jnp.ones((1, 1), bool))
    for options, text in (({"clip": 1.0}, "clip = 1"), ({"beta": -1.0}, "beta = -1")):
        with pytest.raises(UserError, match=text):
            grpo(samples, zero, jnp.zeros(1), **options)
