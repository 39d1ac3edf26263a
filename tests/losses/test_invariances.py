"""What each loss is by definition: its limits, symmetries and fixed points."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import losses
from jaxalign.losses import PREFERENCE_LOSSES, PairLogProbs
from jaxalign.losses.table import losses_table

REFERENCE_FREE = {loss.name for loss in losses.LOSSES if loss.reads == "policy_pairs"}
READS_LENGTH = {  # those whose formula has a length L
    row.name
    for row in losses_table("pairs", "policy_pairs")
    if re.search(r"(?<![a-zA-Z\\])L(?![a-zA-Z])", row.formula + row.definitions)
}
LOG_RATIO_ONLY = set(PREFERENCE_LOSSES) - REFERENCE_FREE - {"rpo", "alpha_dpo", "aot"}
AT_THE_REFERENCE = {  # as the docstrings promise, at the default hyperparameters
    "dpo": np.log(2),
    "robust_dpo": np.log(2),
    "ipo": 25.0,
    "ipo_mean": 25.0,
    "slic_norm": 1.0,
    "dpop": np.log(2),
    "kto": 1.0,
    "sppo": 5e5,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "nca": 2 * np.log(2),
    "bco": 2 * np.log(2),
    "discopop": (1 + np.log(2)) / 2,
    "cal_dpo": np.log(2) + 62500,
    "dpo_shift": np.log(2),
    "minor_dpo": np.log(2),
    "bdpo": np.log(2),
    "mappo": np.log(2),
    "beta_dpo": np.log(2),
    "aot": np.log(2),
    "sigmoid_norm": np.log(2),
}


@pytest.fixture
def pairs(rng):
    def log_probs():
        return jnp.asarray(-rng.gamma(4.0, 3.0, size=6), jnp.float32)

    return PairLogProbs(
        chosen=log_probs(),
        rejected=log_probs(),
        reference_chosen=log_probs(),
        reference_rejected=log_probs(),
        chosen_length=jnp.array([3, 8, 1, 20, 11, 5], jnp.int32),
        rejected_length=jnp.array([7, 2, 4, 20, 30, 6], jnp.int32),
    )


def swapped(pairs):
    """The same pairs with the other response preferred."""
    return PairLogProbs(
        chosen=pairs.rejected,
        rejected=pairs.chosen,
        reference_chosen=pairs.reference_rejected,
        reference_rejected=pairs.reference_chosen,
        chosen_length=pairs.rejected_length,
        rejected_length=pairs.chosen_length,
    )


def with_log_ratios(pairs, chosen, rejected):
    return replace(
        pairs,
        chosen=pairs.reference_chosen + chosen,
        rejected=pairs.reference_rejected + rejected,
    )


def gradient(loss, pairs, **options):
    def total(chosen, rejected):
        return loss(replace(pairs, chosen=chosen, rejected=rejected), **options).sum()

    return jax.grad(total, argnums=(0, 1))(pairs.chosen, pairs.rejected)


def assert_same(left, right, pairs, options_left=(), options_right=()):
    """Two losses agree in value and slope."""
    options_left, options_right = dict(options_left), dict(options_right)
    np.testing.assert_allclose(
        left(pairs, **options_left), right(pairs, **options_right), rtol=2e-5, atol=1e-6
    )
    for one, other in zip(
        gradient(left, pairs, **options_left), gradient(right, pairs, **options_right), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpop", {"lambda_": 0.0}),
        ("robust_dpo", {"beta": 0.1, "label_smoothing": 0.0}),
        ("rpo", {"alpha": 0.0}),
        ("rdpo", {"alpha": 0.0}),
        ("dpo_shift", {"lambda_": 1.0}),
        ("mappo", {"delta_r": 1.0}),
        ("bdpo", {"lambda_": 1.0}),
        ("beta_dpo", {"alpha": 0.0}),
    ],
)
def test_is_dpo_where_its_own_term_is_off(name, options, pairs):
    assert_same(PREFERENCE_LOSSES[name], losses.dpo, pairs, options)


def test_rdpo_of_equal_lengths_is_dpo(pairs):
    pairs = replace(pairs, rejected_length=pairs.chosen_length)
    assert_same(losses.rdpo, losses.dpo, pairs, {"alpha": 0.7})


def test_rdpo_asks_less_of_a_longer_chosen_response(pairs):
    short = replace(pairs, chosen_length=pairs.chosen_length - pairs.chosen_length + 1)
    long = replace(pairs, chosen_length=pairs.chosen_length + 40)
    assert (losses.rdpo(long) < losses.rdpo(short)).all()


def test_dpop_is_dpo_where_chosen_is_above_the_reference(pairs):
    above = with_log_ratios(pairs, jnp.full(6, 1.5), jnp.zeros(6))
    below = with_log_ratios(pairs, jnp.full(6, -1.5), jnp.zeros(6))
    assert_same(losses.dpop, losses.dpo, above)
    assert (losses.dpop(below) > losses.dpo(below) + 1).all()


def test_cpo_is_dpo_with_a_uniform_reference(pairs):
    uniform = replace(
        pairs,
        reference_chosen=jnp.full(6, -9.0),
        reference_rejected=jnp.full(6, -9.0),
    )
    assert_same(losses.cpo, losses.dpo, uniform, {"lambda_": 0.0})


def test_simpo_without_target_is_length_normalised_dpo_without_reference(pairs):
    free = replace(pairs, reference_chosen=jnp.zeros(6), reference_rejected=jnp.zeros(6))
    assert_same(losses.simpo, losses.sigmoid_norm, free, {"beta": 3.0, "gamma": 0.0}, {"beta": 3.0})


def test_simpo_without_target_scales_only_by_beta(pairs):
    """With gamma 0, doubling beta is doubling every log-prob."""
    twice = replace(pairs, chosen=2 * pairs.chosen, rejected=2 * pairs.rejected)
    np.testing.assert_allclose(
        losses.simpo(pairs, beta=4.0, gamma=0.0),
        losses.simpo(twice, beta=2.0, gamma=0.0),
        rtol=1e-5,
    )


def test_alpha_dpo_without_adaption_is_simpo(pairs):
    assert_same(
        losses.alpha_dpo,
        losses.simpo,
        pairs,
        {"beta": 3.0, "gamma": 0.7, "alpha": 0.0},
        {"beta": 3.0, "gamma": 0.7},
    )


def test_length_normalised_losses_of_one_token_are_their_sums(pairs):
    one = replace(pairs, chosen_length=jnp.ones(6, int), rejected_length=jnp.ones(6, int))
    assert_same(losses.ipo_mean, losses.ipo, one)
    assert_same(losses.sigmoid_norm, losses.dpo, one, {"beta": 0.1})


def test_label_smoothing_is_the_expected_loss_over_flipped_labels(pairs):
    for loss in (losses.dpo, losses.aot):
        options = {}
        if loss is losses.aot:
            options = {"reference_margin": pairs.reference_chosen - pairs.reference_rejected}
        flipped = {name: -value for name, value in options.items()}
        expected = 0.8 * loss(pairs, **options) + 0.2 * loss(swapped(pairs), **flipped)
        np.testing.assert_allclose(
            loss(pairs, label_smoothing=0.2, **options), expected, rtol=1e-5, atol=1e-6
        )


def test_robust_dpo_averages_over_flips_to_the_clean_loss(pairs):
    options = {"beta": 0.3, "label_smoothing": 0.2}
    average = 0.8 * losses.robust_dpo(pairs, **options) + 0.2 * losses.robust_dpo(
        swapped(pairs), **options
    )
    np.testing.assert_allclose(average, losses.dpo(pairs, beta=0.3), rtol=1e-4, atol=1e-5)


def test_swapping_the_pair_mirrors_the_margin(pairs):
    np.testing.assert_allclose(swapped(pairs).margin, -pairs.margin)
    np.testing.assert_allclose(  # -log s(z) + log s(-z) = -z
        losses.dpo(pairs) - losses.dpo(swapped(pairs)), -0.1 * pairs.margin, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(  # (h - t)^2 - (h + t)^2 = -4 h t
        losses.ipo(pairs) - losses.ipo(swapped(pairs)), -20 * pairs.margin, rtol=1e-4, atol=1e-3
    )
    np.testing.assert_allclose(losses.simper(pairs), -losses.simper(swapped(pairs)), rtol=1e-6)


def test_bco_and_apo_zero_treat_the_two_sides_as_mirror_images(pairs):
    """Exchanging the responses and the signs of their log-ratios changes nothing."""
    mirrored = with_log_ratios(pairs, -pairs.rejected_log_ratio, -pairs.chosen_log_ratio)
    zero = jnp.asarray(0.0)
    np.testing.assert_allclose(
        losses.bco(pairs, mean_log_ratio=zero), losses.bco(mirrored, mean_log_ratio=zero), rtol=1e-5
    )
    np.testing.assert_allclose(losses.apo_zero(pairs), losses.apo_zero(mirrored), rtol=1e-5)
    np.testing.assert_allclose(losses.sppo(pairs), losses.sppo(mirrored), rtol=1e-5)


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_ipo_rests_at_its_target_margin_alone(tau, pairs):
    target = with_log_ratios(pairs, jnp.full(6, 0.25 / tau), jnp.full(6, -0.25 / tau))
    np.testing.assert_allclose(losses.ipo(target, tau=tau), 0, atol=1e-9)
    np.testing.assert_allclose(gradient(losses.ipo, target, tau=tau), 0, atol=1e-4)
    short = with_log_ratios(pairs, jnp.full(6, 0.2 / tau), jnp.full(6, -0.2 / tau))
    past = with_log_ratios(pairs, jnp.full(6, 0.3 / tau), jnp.full(6, -0.3 / tau))
    assert (gradient(losses.ipo, short, tau=tau)[0] < 0).all()  # descent raises chosen
    assert (gradient(losses.ipo, past, tau=tau)[0] > 0).all()  # descent lowers it again


def test_ipo_with_soft_labels_is_a_square_about_the_expected_target(pairs):
    """Expected over the labels it is (h - (p - 1/2) / tau)^2 + const (arXiv:2310.12036)."""
    p, tau = 0.7, 0.5
    soft = p * losses.ipo(pairs, tau=tau) + (1 - p) * losses.ipo(swapped(pairs), tau=tau)
    square = (pairs.margin - (p - 0.5) / tau) ** 2
    np.testing.assert_allclose(soft - square, np.full(6, (soft - square)[0]), rtol=1e-3)


@pytest.mark.parametrize("name", ["sppo", "cal_dpo"])
def test_absolute_targets_are_half_over_beta(name, pairs):
    aimed = with_log_ratios(pairs, jnp.full(6, 5.0), jnp.full(6, -5.0))
    in_chosen, in_rejected = gradient(PREFERENCE_LOSSES[name], aimed, beta=0.1)
    # The logistic part of Cal-DPO still pulls by sigma(-10).
    np.testing.assert_allclose(in_chosen, 0, atol=1e-4)
    np.testing.assert_allclose(in_rejected, 0, atol=1e-4)


def test_exo_rests_where_the_policy_prefers_as_the_smoothed_label_does(pairs):
    beta, epsilon = 0.5, 0.1
    margin = float(np.log((1 - epsilon) / epsilon)) / beta
    aimed = with_log_ratios(pairs, jnp.full(6, margin), jnp.zeros(6))
    options = {"beta": beta, "label_smoothing": epsilon}
    np.testing.assert_allclose(losses.exo(aimed, **options), 0, atol=1e-6)
    np.testing.assert_allclose(gradient(losses.exo, aimed, **options), 0, atol=1e-6)
    assert (losses.exo(pairs, **options) > 0).all()


def test_the_hinges_rest_beyond_their_margins(pairs):
    inside = with_log_ratios(pairs, jnp.full(6, 9.0), jnp.zeros(6))
    beyond = with_log_ratios(pairs, jnp.full(6, 11.0), jnp.zeros(6))
    np.testing.assert_allclose(losses.slic_norm(inside), 0.1, rtol=1e-4)
    np.testing.assert_array_equal(losses.slic_norm(beyond), 0)
    np.testing.assert_array_equal(gradient(losses.slic_norm, beyond), 0)
    leading = replace(pairs, chosen=pairs.rejected + 1.5)
    np.testing.assert_array_equal(losses.slic(leading, lambda_=0.0), 0)
    np.testing.assert_array_equal(gradient(losses.slic, leading, lambda_=0.2)[1], 0)
    ranked = replace(pairs, chosen=-0.1 * pairs.chosen_tokens, rejected=-pairs.rejected_tokens)
    np.testing.assert_allclose(losses.rrhf(ranked, lambda_=0.5), -0.5 * ranked.chosen)
    led = losses.stable_alignment(ranked, gap=0.5, margin=1.0, scale=1.0)  # by 0.9 nats a token
    np.testing.assert_allclose(led, 0.1, rtol=1e-5)


def test_minor_dpo_lets_a_fallen_response_be(pairs):
    fallen = with_log_ratios(pairs, jnp.ones(6), -jnp.arange(1.0, 7.0))
    np.testing.assert_array_equal(gradient(losses.minor_dpo, fallen)[1], 0)
    assert len(np.unique(np.asarray(losses.minor_dpo(fallen)).round(5))) == 1
    risen = with_log_ratios(pairs, jnp.ones(6), jnp.arange(1.0, 7.0))
    assert_same(losses.minor_dpo, losses.dpo, risen)


def test_bdpo_bounds_what_a_rejected_response_can_earn(pairs):
    """However far it falls, it counts for no more than log(1 - lambda)."""
    gone = with_log_ratios(pairs, jnp.zeros(6), jnp.full(6, -1e3))
    expected = np.log1p(np.exp(0.3 * np.log(1 - 0.6)))
    np.testing.assert_allclose(losses.bdpo(gone, beta=0.3, lambda_=0.6), expected, rtol=1e-5)
    np.testing.assert_array_equal(gradient(losses.bdpo, gone)[1], 0)


def test_apo_down_lowers_both_responses_near_the_reference(pairs):
    near = with_log_ratios(pairs, jnp.full(6, 1.0), jnp.full(6, 3.0))
    in_chosen, in_rejected = gradient(losses.apo_down, near)
    assert (in_chosen > 0).all()
    assert (in_rejected > in_chosen).all()


def test_orpo_is_the_odds_ratio_written_with_probabilities(pairs):
    p, q = np.exp(np.asarray(pairs.chosen_mean)), np.exp(np.asarray(pairs.rejected_mean))
    ratio = (p / (1 - p)) / (q / (1 - q))
    expected = -np.log(p) + 0.3 * np.log1p(1 / ratio)
    np.testing.assert_allclose(losses.orpo(pairs, lambda_=0.3), expected, rtol=1e-5)


def test_aot_does_not_care_which_pair_has_which_reference_margin(pairs, rng):
    order = rng.permutation(6)
    shuffled = replace(
        pairs,
        reference_chosen=pairs.reference_chosen[order],
        reference_rejected=pairs.reference_rejected[order],
    )
    np.testing.assert_allclose(losses.aot(shuffled), losses.aot(pairs), rtol=1e-6)
    assert not np.allclose(losses.dpo(shuffled), losses.dpo(pairs))


def test_aot_is_dpo_where_both_models_rank_the_pairs_alike(pairs):
    alike = replace(pairs, chosen=pairs.rejected + 2 * (pairs.reference_chosen - pairs.rejected))
    alike = replace(alike, reference_rejected=pairs.rejected)
    assert_same(losses.aot, losses.dpo, alike)


def test_aot_matches_at_the_least_cost(pairs):
    """Sorting is the optimal transport: no other matching has a smaller sum, the cost is convex."""
    matched = losses.aot(pairs, beta=0.5).sum()
    reference = pairs.reference_chosen - pairs.reference_rejected
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(6)
        assert (
            losses.aot(pairs, beta=0.5, reference_margin=reference[order]).sum() >= matched - 1e-5
        )


def test_kto_of_pairs_is_kto_of_their_responses(pairs):
    kl = jnp.asarray(1.3)
    options = {"beta": 0.3, "lambda_desirable": 1.4, "lambda_undesirable": 0.6, "kl": kl}
    responses = losses.LabelledLogProbs(
        log_prob=jnp.concatenate([pairs.chosen, pairs.rejected]),
        reference=jnp.concatenate([pairs.reference_chosen, pairs.reference_rejected]),
        desirable=jnp.arange(12) < 6,
        length=jnp.full(12, 4),
        mismatched_log_ratio=jnp.full(12, jnp.nan),
    )
    single = losses.kto_unpaired(responses, **options)
    np.testing.assert_allclose(single[:6] + single[6:], losses.kto(pairs, **options), rtol=1e-6)


def test_kto_zero_point_is_the_weighted_mean_held_at_zero():
    log_ratios, weight = jnp.array([4.0, -1.0, 3.0]), jnp.array([1.0, 1.0, 0.0])
    np.testing.assert_allclose(losses.kto_kl(log_ratios), 2.0)
    np.testing.assert_allclose(losses.kto_kl(log_ratios, weight), 1.5)
    np.testing.assert_allclose(losses.kto_kl(-log_ratios), 0.0)
    np.testing.assert_allclose(losses.kto_kl(log_ratios, jnp.zeros(3)), 0.0)
    np.testing.assert_allclose(jax.grad(losses.kto_kl)(log_ratios), 0.0)


@pytest.mark.parametrize("name", AT_THE_REFERENCE)
def test_value_where_policy_is_reference(name, pairs):
    equal = with_log_ratios(pairs, jnp.zeros(6), jnp.zeros(6))
    if name == "aot":  # on quantiles, it needs the pairs' own order
        equal = replace(equal, chosen=equal.reference_chosen, rejected=equal.reference_rejected)
    np.testing.assert_allclose(PREFERENCE_LOSSES[name](equal), AT_THE_REFERENCE[name], rtol=1e-5)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_reads_the_reference_only_if_it_says_so(name, pairs):
    moved = replace(pairs, reference_chosen=pairs.reference_chosen + 3)
    same = np.allclose(PREFERENCE_LOSSES[name](moved), PREFERENCE_LOSSES[name](pairs))
    assert same == (name in REFERENCE_FREE)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_reads_lengths_only_if_it_says_so(name, pairs):
    moved = replace(pairs, chosen_length=pairs.chosen_length + 3)
    same = np.allclose(PREFERENCE_LOSSES[name](moved), PREFERENCE_LOSSES[name](pairs))
    assert same == (name not in READS_LENGTH)


@pytest.mark.parametrize("name", sorted(LOG_RATIO_ONLY))
def test_sees_policy_and_reference_through_their_ratio(name, pairs):
    moved = replace(pairs, chosen=pairs.chosen - 4, reference_chosen=pairs.reference_chosen - 4)
    np.testing.assert_allclose(
        PREFERENCE_LOSSES[name](moved), PREFERENCE_LOSSES[name](pairs), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpo", {"beta": 0.0}, "beta = 0.0: must be > 0"),
        ("dpo", {"label_smoothing": 0.5}, r"label_smoothing = 0.5: must be in \[0, 0.5\)"),
        ("robust_dpo", {"label_smoothing": 0.5}, "label_smoothing"),
        ("ipo", {"tau": -1.0}, "tau = -1.0"),
        ("slic", {"lambda_": -0.1}, "lambda_ = -0.1: must be >= 0"),
        ("exo", {"label_smoothing": 0.0}, "label_smoothing = 0.0"),
        ("bdpo", {"lambda_": 1.5}, "lambda_ = 1.5"),
        ("discopop", {"tau": 0.0}, "tau = 0.0"),
    ],
)
def test_a_hyperparameter_out_of_its_domain_is_named(name, options, message, pairs):
    with pytest.raises(ValueError, match=message):
        PREFERENCE_LOSSES[name](pairs, **options)
