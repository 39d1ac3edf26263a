"""Divergences, token weights and pair weights: closed forms in float64, and TRL's own numbers."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.entanglement import coefficients
from jaxalign.errors import UserError
from jaxalign.losses import (
    NO_SWITCHES,
    PREFERENCE_LOSSES,
    Divergence,
    PairLogProbs,
    Switches,
    dpo,
    importance_weights,
    sigmoid_norm,
    simpo,
    weighted,
)
from jaxalign.losses.lookup import check_switches, find_loss
from tests.losses.test_every_loss import random_pairs

RATIOS = np.array([-3.0, -0.5, 0.0, 1e-4, 0.7, 2.5])
SCORES = {
    Divergence("reverse_kl"): (lambda r: r, np.ones_like),
    Divergence("forward_kl"): (lambda r: 1 - np.exp(-r), lambda r: np.exp(-r)),
    Divergence("jensen_shannon"): (
        lambda r: np.log(2 * np.exp(r) / (1 + np.exp(r))),
        lambda r: 1 / (1 + np.exp(r)),
    ),
    Divergence("alpha", 0.3): (
        lambda r: (np.exp(-0.7 * r) - 1) / -0.7,
        lambda r: np.exp(-0.7 * r),
    ),
    Divergence("alpha", 2.0): (lambda r: np.exp(r) - 1, np.exp),
}
TRL = json.loads((Path(__file__).parents[1] / "fixtures" / "trl_losses.json").read_text())
NAMES = {
    "js_divergence": "jensen_shannon",
    "alpha_divergence": "alpha",
    "sigmoid": "dpo",
    "bco_pair": "bco",
    "ipo": "ipo_mean",  # TRL's is per token
    "nca_pair": "nca",
}


@pytest.mark.parametrize("divergence", SCORES, ids=str)
def test_the_score_is_the_derivative_of_the_papers_function(divergence):
    value, slope = SCORES[divergence]
    ratios = jnp.float32(RATIOS)
    slopes = jax.grad(lambda r: divergence.score(r).sum())(ratios)
    np.testing.assert_allclose(divergence.score(ratios), value(RATIOS), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(slopes, slope(RATIOS), rtol=1e-5)


def test_the_alpha_divergence_has_both_kls_at_its_ends():
    ratios = jnp.float32(RATIOS)
    for alpha, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        found = Divergence("alpha", alpha).score(ratios)
        np.testing.assert_allclose(found, Divergence(name).score(ratios), rtol=1e-6)


@pytest.mark.parametrize("divergence", SCORES, ids=str)
def test_scores_of_far_policies_are_finite(divergence):
    far = jnp.array([-1e4, 1e4], jnp.float32)
    assert np.isfinite(divergence.score(far)).all()
    assert np.isfinite(jax.grad(lambda r: divergence.score(r).sum())(far)).all()


@pytest.mark.parametrize("divergence", SCORES, ids=str)
def test_coefficients_of_dpo_have_the_slopes_of_the_score(divergence, rng):
    """d_w = beta sigma(-beta h) s'(r_w), and d_l with s'(r_l): entangled no longer one to one."""
    pairs = dataclasses.replace(random_pairs(rng), divergence=divergence)
    near = jnp.asarray(rng.normal(size=(2, 7)), jnp.float32)
    pairs = dataclasses.replace(
        pairs,
        chosen=pairs.reference_chosen + near[0],
        rejected=pairs.reference_rejected + near[1],
    )
    value, slope = SCORES[divergence]
    ratios = np.asarray(near, np.float64)
    z = 0.3 * (value(ratios[0]) - value(ratios[1]))
    np.testing.assert_allclose(dpo(pairs, beta=0.3), np.log1p(np.exp(-z)), rtol=1e-4)
    found = coefficients(dpo, pairs, beta=0.3)
    pull = 0.3 / (1 + np.exp(z))
    np.testing.assert_allclose(found.chosen, pull * slope(ratios[0]), rtol=1e-4)
    np.testing.assert_allclose(found.rejected, pull * slope(ratios[1]), rtol=1e-4)


def test_defaults_leave_pairs_and_tokens_alone(rng):
    pairs = random_pairs(rng)
    assert jax.tree.structure(NO_SWITCHES.seen(pairs)) == jax.tree.structure(pairs)
    tokens = jnp.asarray(rng.normal(size=(3, 2, 5)), jnp.float32)
    length = jnp.full((3, 2), 5)
    np.testing.assert_array_equal(NO_SWITCHES.total(tokens, length), tokens.sum(-1))


def test_means_make_dpo_length_normalised_and_leave_simpo_alone(rng):
    pairs, mean = random_pairs(rng), Switches(log_probs="mean")
    np.testing.assert_allclose(
        dpo(mean.seen(pairs), beta=5.0), sigmoid_norm(pairs, beta=5.0), rtol=1e-6
    )
    np.testing.assert_allclose(simpo(mean.seen(pairs)), simpo(pairs), rtol=1e-6)


def test_the_tail_is_what_is_longer_than_the_other_response():
    tokens = jnp.array([[[1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 0.0, 0.0, 0.0]]])
    length = jnp.array([[5, 2]])
    found = Switches(tail_weight=0.5).total(tokens, length)
    np.testing.assert_allclose(found, [[1 + 2 + 0.5 * (3 + 4 + 5), 6 + 7]])
    np.testing.assert_allclose(Switches(tail_weight=0.0).total(tokens, length), [[3, 13]])


def test_a_uniform_policy_has_weight_one_and_a_certain_one_its_own_probability():
    length = jnp.array([[3, 2]])
    real = jnp.arange(4)[None, None] < length[..., None]
    uniform = jnp.where(real, -jnp.log(29.0), 0.0)
    np.testing.assert_allclose(importance_weights(uniform, uniform, length), [1.0], rtol=1e-6)
    unlikely = jnp.where(real, -2.0, 0.0)  # never agrees with what the policy is certain of
    weights = importance_weights(unlikely, jnp.zeros_like(unlikely), length)
    np.testing.assert_allclose(weights, np.exp([-4.0]), rtol=1e-6)


def trl_name(case):
    parts = "+".join(case["loss_types"]), case["f_divergence_type"], case["ld_alpha"]
    return "-".join(map(str, (*parts, "wpo" if case["use_weighting"] else "")))


@pytest.mark.parametrize("case", TRL["cases"], ids=trl_name)
def test_loss_and_token_gradients_are_those_of_trl(case):
    """The batch's mean loss of TRL 1.16, through token log-probs (fixtures/make_trl_losses.py)."""
    divergence = case["f_divergence_type"]
    switches = Switches(
        divergence=Divergence(NAMES.get(divergence, divergence)),
        tail_weight=1.0 if case["ld_alpha"] is None else case["ld_alpha"],
        importance=case["use_weighting"],
    )
    length = jnp.asarray(case["length"]).T
    fields = {
        name: jnp.asarray(TRL[name], jnp.float32).swapaxes(0, 1)
        for name in ("policy", "reference", "collision")
    }
    real = jnp.arange(7)[None, None] < length[..., None]
    fields = {name: jnp.where(real, value, 0.0) for name, value in fields.items()}
    names = [NAMES.get(name, name) for name in case["loss_types"]]
    members = [PREFERENCE_LOSSES[name] for name in names]
    loss = weighted(list(zip(members, case["loss_weights"], strict=True)))
    scales = {"ipo_mean": "tau", "sft": None}
    options = {
        f"{name}.{key}": case["beta"]
        for name in names
        if (key := scales.get(name, "beta")) is not None
    }
    if "bco" in names:
        options["bco.mean_log_ratio"] = jnp.float32(0.0)  # TRL's bco_pair has no shift

    def mean(policy):
        own, known = (switches.total(x, length) for x in (policy, fields["reference"]))
        pairs = PairLogProbs(
            chosen=own[:, 0],
            rejected=own[:, 1],
            reference_chosen=known[:, 0],
            reference_rejected=known[:, 1],
            chosen_length=length[:, 0],
            rejected_length=length[:, 1],
        )
        values = loss(switches.seen(pairs), **options)
        if switches.importance:
            values = values * importance_weights(policy, fields["collision"], length)
        return values.mean()

    value, gradient = jax.value_and_grad(mean)(fields["policy"])
    np.testing.assert_allclose(value, case["loss"], rtol=1e-5)
    gradient = jnp.where(real, gradient, 0.0).swapaxes(0, 1)
    scale = np.abs(case["gradient"]).max()
    np.testing.assert_allclose(gradient, case["gradient"], rtol=2e-5, atol=max(1e-7, 1e-6 * scale))


@pytest.mark.parametrize(
    ("name", "switches", "message"),
    [
        ("simpo", {"divergence": Divergence("forward_kl")}, "divergence: simpo does not read"),
        ("aot", {"divergence": Divergence("alpha")}, "divergence: aot does not read"),
        ("simpo", {"log_probs": "mean"}, "log_probs: simpo reads means over tokens itself"),
        ("ipo_mean", {"log_probs": "mean"}, "log_probs: ipo_mean reads means"),
    ],
)
def test_a_switch_without_effect_is_refused(name, switches, message):
    with pytest.raises(UserError, match=message):
        check_switches(find_loss(name, {}), {}, Switches(**switches))


@pytest.mark.parametrize("name", [*PREFERENCE_LOSSES, "bco:0.5 simpo:1"])
def test_every_loss_of_log_ratios_takes_every_divergence(name):
    loss = find_loss(name, {})
    try:
        check_switches(loss, {}, Switches(divergence=Divergence("jensen_shannon")))
    except UserError:
        assert loss.reads == "policy_pairs" or name in ("aot", "alpha_dpo")
