"""Losses of single responses, in NumPy's float64, and the rule for unequal numbers of labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import (
    LabelledLogProbs,
    bco,
    bco_unpaired,
    kto_unpaired,
    kto_weights,
    statistics_of,
)
from tests.losses.test_statistics import pairs_of


def responses_of(rng, number, desirable=None):
    log_prob, reference, mismatched = -rng.gamma(4.0, 3.0, (3, number))
    return LabelledLogProbs(
        log_prob=jnp.asarray(log_prob, jnp.float32),
        reference=jnp.asarray(reference, jnp.float32),
        desirable=jnp.asarray(rng.random(number) < 0.4 if desirable is None else desirable),
        length=jnp.full(number, 4, jnp.int32),
        mismatched_log_ratio=jnp.asarray(mismatched + 14, jnp.float32),
    )


def in_float64(responses):
    """Log-ratio, label and mismatched log-ratio."""
    ratio = np.asarray(responses.log_prob, np.float64) - np.asarray(responses.reference, np.float64)
    return ratio, np.asarray(responses.desirable), np.asarray(responses.mismatched_log_ratio)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def test_kto_is_its_formula_with_the_zero_point_of_mismatched_responses(rng):
    responses = responses_of(rng, 40)
    ratio, desirable, mismatched = in_float64(responses)
    zero = max(0.0, mismatched.mean(dtype=np.float64))
    assert zero > 0
    expected = np.where(
        desirable,
        1.4 * (1 - sigmoid(0.2 * (ratio - zero))),
        0.6 * (1 - sigmoid(0.2 * (zero - ratio))),
    )
    options = {"beta": 0.2, "lambda_desirable": 1.4, "lambda_undesirable": 0.6}
    np.testing.assert_allclose(kto_unpaired(responses, **options), expected, rtol=2e-5)
    weight = jnp.asarray(rng.random(40) < 0.5, jnp.float32)
    taken = statistics_of(kto_unpaired).of(responses, weight, {})
    kept = max(0.0, mismatched[np.asarray(weight) > 0].mean(dtype=np.float64))
    np.testing.assert_allclose(taken["kl"], kept, rtol=1e-5)
    slope = jax.grad(lambda x: statistics_of(kto_unpaired).of(x, weight, {})["kl"], allow_int=True)
    np.testing.assert_array_equal(slope(responses).mismatched_log_ratio, 0.0)


def test_at_the_reference_kto_is_one_half_and_bco_log_2(rng):
    responses = responses_of(rng, 8)
    same = responses.log_prob
    zero = jnp.zeros(8)
    still = LabelledLogProbs(
        log_prob=same,
        reference=same,
        desirable=responses.desirable,
        length=responses.length,
        mismatched_log_ratio=zero,
    )
    np.testing.assert_allclose(kto_unpaired(still), 0.5)
    np.testing.assert_allclose(bco_unpaired(still), np.log(2), rtol=1e-6)


def test_bco_shifts_by_the_middle_of_the_labels_means_so_far(rng):
    statistics = statistics_of(bco_unpaired)
    running = {name: jnp.float32(value) for name, value in statistics.start.items()}
    seen = {True: [], False: []}
    batches = [responses_of(rng, 3, [True] * 3), responses_of(rng, 9), responses_of(rng, 5)]
    for number, responses in enumerate(batches):
        weight = np.ones(len(responses.log_prob))
        weight[0] = number != 1  # a row that fills up the second batch
        ratio, desirable, _ = in_float64(responses)
        for label in seen:
            seen[label] += ratio[(desirable == label) & (weight > 0)].tolist()
        running = statistics.update(running, responses, jnp.asarray(weight, jnp.float32))
        taken = statistics.of(responses, None, running)
        shift = np.mean([np.mean(values) for values in seen.values() if values])
        assert set(taken) == {"mean_log_ratio"}
        np.testing.assert_allclose(taken["mean_log_ratio"], shift, rtol=1e-4)
        sign = np.where(desirable, 1, -1)
        expected = -np.log(sigmoid(sign * 0.3 * (ratio - shift)))
        values = bco_unpaired(responses, beta=0.3, **taken)
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6)


def test_bco_of_both_responses_of_pairs_is_bco_of_the_pairs(rng):
    pairs = pairs_of(rng, 6)
    both = LabelledLogProbs(
        log_prob=jnp.concatenate([pairs.chosen, pairs.rejected]),
        reference=jnp.concatenate([pairs.reference_chosen, pairs.reference_rejected]),
        desirable=jnp.arange(12) < 6,
        length=jnp.full(12, 4, jnp.int32),
        mismatched_log_ratio=jnp.full(12, jnp.nan),
    )
    single = bco_unpaired(both, beta=0.2)
    np.testing.assert_allclose(single[:6] + single[6:], bco(pairs, beta=0.2), rtol=1e-5)


@pytest.mark.parametrize("desirable", [0, 1, 3, 10, 40, 400, 10_000])
@pytest.mark.parametrize("undesirable", [0, 1, 4, 10, 30, 500])
def test_weights_keep_the_papers_rule(desirable, undesirable):
    first, second = kto_weights(desirable, undesirable)
    assert min(first, second) == 1
    if not desirable or not undesirable:
        assert (first, second) == (1, 1)
        return
    assert 1 - 1e-12 <= first * desirable / (second * undesirable) <= 4 / 3 + 1e-12
    if 1 <= desirable / undesirable <= 4 / 3:
        assert (first, second) == (1, 1)
