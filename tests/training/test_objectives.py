"""The metrics of a batch of pairs, by hand."""

import dataclasses

import jax.numpy as jnp
import pytest

from jaxalign.losses import PairLogProbs, dpo
from jaxalign.training.objectives import pair_metrics, reward_scale

PAIRS = PairLogProbs(
    chosen=jnp.array([-10.0, -20.0, -8.0, -5.0]),
    rejected=jnp.array([-12.0, -18.0, -8.0, -50.0]),
    reference_chosen=jnp.array([-11.0, -24.0, -8.0, -5.0]),
    reference_rejected=jnp.array([-11.0, -20.0, -8.0, -1.0]),
    chosen_length=jnp.array([5, 10, 4, 1]),
    rejected_length=jnp.array([10, 6, 4, 1]),
)


def test_metrics_are_those_of_the_weighted_pairs_by_hand():
    weight = jnp.array([1.0, 1.0, 1.0, 0.0])  # the last pair only fills the batch up
    metrics = pair_metrics(PAIRS, dpo(PAIRS, beta=0.5), weight, scale=0.5)
    values = {name: float(mean.total / mean.count) for name, mean in metrics.items()}
    # rewards are half the log-ratios, which are 1, 4, 0 and -1, 2, 0
    assert values["rewards/chosen"] == pytest.approx(2.5 / 3)
    assert values["rewards/rejected"] == pytest.approx(0.5 / 3)
    assert values["rewards/margins"] == pytest.approx(2 / 3)
    assert values["rewards/accuracies"] == pytest.approx(2.5 / 3)  # a draw is half
    assert values["logps/chosen"] == pytest.approx(-38 / 3)
    assert values["logps/rejected"] == pytest.approx(-38 / 3)
    assert values["logps/accuracies"] == pytest.approx(1.5 / 3)
    # means: -2 against -1.2; -2 against -3; -2 against -2
    assert values["logps/mean_accuracies"] == pytest.approx(1.5 / 3)


def test_the_reward_is_in_the_losss_own_unit():
    assert reward_scale(dpo, {}) == 0.1
    assert reward_scale(dpo, {"beta": 0.3}) == 0.3
    assert reward_scale(lambda pairs, *, tau=0.7: pairs, {}) == 0.7
    assert reward_scale(lambda pairs: pairs, {}) == 1.0


def test_differences_that_rounding_makes_are_draws():
    """Policy and reference of one model, through two programs: log-probs of a 135M model."""
    reference = PAIRS.chosen * 7.3, PAIRS.rejected * 9.1
    off = jnp.array([1.0, -1.0, 1.0, -1.0]) * 2e-6
    same = dataclasses.replace(
        PAIRS,
        chosen=reference[0] * (1 + off),
        rejected=reference[1] * (1 - off),
        reference_chosen=reference[0],
        reference_rejected=reference[1],
    )
    weight = jnp.ones(4)

    def accuracy(pairs, scale):
        mean = pair_metrics(pairs, dpo(pairs), weight, scale=scale)["rewards/accuracies"]
        return float(mean.total / mean.count)

    moved = dataclasses.replace(same, chosen=same.chosen + jnp.array([0.01, 0.01, 0.01, -0.01]))
    swapped = dataclasses.replace(
        moved,
        chosen=moved.rejected,
        rejected=moved.chosen,
        reference_chosen=moved.reference_rejected,
        reference_rejected=moved.reference_chosen,
    )
    for scale in (1e-3, 0.1, 1.0, 50.0):  # the unit of the rewards decides nothing
        assert accuracy(same, scale) == 0.5
        assert accuracy(moved, scale) == 0.75
        assert accuracy(swapped, scale) == 0.25
