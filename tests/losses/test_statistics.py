"""Running statistics of losses: the papers' recursions written out, over unequal batches."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import PairLogProbs, Statistics, bco, beta_dpo, statistics_of, with_statistics


def pairs_of(rng, number):
    values = [jnp.asarray(-rng.gamma(4.0, 3.0, number), jnp.float32) for _ in range(4)]
    length = jnp.full(number, 4, jnp.int32)
    names = ("chosen", "rejected", "reference_chosen", "reference_rejected")
    return PairLogProbs(
        **dict(zip(names, values, strict=True)), chosen_length=length, rejected_length=length
    )


def batches_of(rng):
    """Pairs and weights; the second batch is filled up with two rows of weight 0."""
    weights = (np.ones(5), np.array([1.0, 0.0, 1.0, 0.0]), np.ones(3))
    return [(pairs_of(rng, len(w)), jnp.asarray(w, jnp.float32)) for w in weights]


def test_bco_shifts_by_the_mean_reward_of_all_responses_so_far(rng):
    """As TRL's RunningMoments: each batch enters before its own loss."""
    statistics = statistics_of(bco)
    running = {name: jnp.float32(value) for name, value in statistics.start.items()}
    seen = []
    for pairs, weight in batches_of(rng):
        kept = np.flatnonzero(weight)
        for side in (pairs.chosen_log_ratio, pairs.rejected_log_ratio):
            seen += np.asarray(side, np.float64)[kept].tolist()
        running = statistics.update(running, pairs, weight)
        taken = statistics.of(pairs, weight, running)
        assert set(taken) == {"mean_log_ratio"}
        np.testing.assert_allclose(taken["mean_log_ratio"], np.mean(seen), rtol=1e-5)
        chosen, rejected = (
            0.01 * (np.asarray(x, np.float64) - np.mean(seen))
            for x in (pairs.chosen_log_ratio, pairs.rejected_log_ratio)
        )
        expected = np.log1p(np.exp(-chosen)) + np.log1p(np.exp(rejected))
        np.testing.assert_allclose(bco(pairs, **taken), expected, rtol=1e-5)
    assert running["responses"] == len(seen)


def test_beta_dpo_follows_the_batch_against_its_running_mean(rng):
    """M_0 from 0, 0.9 M_0 + 0.1 mean before each batch's beta, as in the authors' code."""
    statistics = statistics_of(beta_dpo)
    running = {name: jnp.float32(value) for name, value in statistics.start.items()}
    threshold = 0.0
    for pairs, weight in batches_of(rng):
        margin = np.asarray(pairs.margin, np.float64)
        mean = margin[np.flatnonzero(weight)].mean()
        threshold = 0.9 * threshold + 0.1 * mean
        running = statistics.update(running, pairs, weight)
        taken = statistics.of(pairs, weight, running)
        np.testing.assert_allclose(taken["threshold"], threshold, rtol=1e-5)
        beta = max(0.1 * (1 + 0.6 * (mean - threshold)), 1e-3)
        expected = np.log1p(np.exp(-beta * margin))
        np.testing.assert_allclose(beta_dpo(pairs, **taken), expected, rtol=1e-4)


def test_a_loss_of_ones_own_declares_what_it_takes():
    statistics = Statistics(batch=lambda pairs, weight: {"mean": pairs.margin.mean()})

    @with_statistics(statistics)
    def own(pairs, *, mean):
        return pairs.margin - mean

    assert statistics_of(own) is statistics
    assert statistics_of(lambda pairs: pairs.margin) is None


@pytest.mark.parametrize("loss", [bco, beta_dpo])
def test_without_running_statistics_the_losss_own_defaults_hold(loss, rng):
    pairs = pairs_of(rng, 4)
    taken = statistics_of(loss).of(pairs, None, {})
    np.testing.assert_allclose(loss(pairs, **taken), loss(pairs), rtol=1e-6)
