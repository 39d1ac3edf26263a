"""The IPO paper's bandits: closed forms by hand, and simulations that come to them."""

import numpy as np
import pytest

from experiments.ipo_md.bandits import DATA, comparisons, exact_ipo, interval, simulated
from experiments.ipo_md.methods import fitted_rewards
from jaxalign.games import GAMES
from jaxalign.losses import dpo, ipo

TOTAL, CYCLE, PRINTED, MENDED = DATA.values()


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0, 3.0])
def test_closed_forms(tau):
    def proportional(*weights):
        return np.array(weights) / np.sum(weights)

    total = proportional(np.exp(2 / (3 * tau)), np.exp(1 / (3 * tau)), 1)
    np.testing.assert_allclose(exact_ipo(TOTAL, tau), total)
    np.testing.assert_allclose(exact_ipo(CYCLE, tau), 1 / 3)
    np.testing.assert_allclose(exact_ipo(PRINTED, tau), 1 / 3)
    mended = proportional(1, 1, np.exp(-1 / (2 * tau)))
    np.testing.assert_allclose(exact_ipo(MENDED, tau), mended)


def test_comparisons_become_rates():
    both, rates = comparisons(("ab", "ba", "ac"))
    np.testing.assert_array_equal(both, [[0, 2, 1], [2, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(rates, [[0.5, 0.5, 1], [0.5, 0.5, 0.5], [0, 0.5, 0.5]])


@pytest.mark.parametrize("data", [TOTAL, MENDED])
def test_ipo_comes_to_its_closed_form_and_dpo_drops_what_never_wins(data):
    options = {"seeds": 4, "steps": 3000, "every": 1000}
    found = simulated(ipo, data, tau=0.5, **options)
    assert found.shape == (4, 4, 3)
    np.testing.assert_allclose(found[:, -1].mean(axis=0), exact_ipo(data, 0.5), atol=0.04)
    assert simulated(dpo, data, beta=0.5, **options)[:, -1, 2].max() < 1e-3


def test_an_action_that_is_never_compared_keeps_its_logit():
    """Why the data set as printed cannot show an action vanishing: c's gradient is zero."""
    for loss, options in ((ipo, {"tau": 0.5}), (dpo, {"beta": 0.5})):
        found = simulated(loss, PRINTED, seeds=3, steps=2000, every=500, **options)
        assert np.all(np.abs(found[..., 2] - 1 / 3) < 0.01)


def test_an_interval_over_seeds():
    means, widths = interval(np.arange(10.0))
    np.testing.assert_allclose([means, widths], [4.5, 2.1659], rtol=1e-4)


def test_a_reward_is_fitted():
    np.testing.assert_allclose(fitted_rewards(GAMES["bradley_terry"]), [1.5, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(fitted_rewards(GAMES["dice"]), 0, atol=1e-6)
