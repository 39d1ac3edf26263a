"""d_w and d_l against the paper's closed forms, written out here by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.entanglement import coefficients
from jaxalign.losses import PREFERENCE_LOSSES, PairLogProbs

RNG = np.random.default_rng(0)
PAIRS = PairLogProbs(
    chosen=jnp.asarray(-RNG.uniform(10, 60, 32)),
    rejected=jnp.asarray(-RNG.uniform(10, 60, 32)),
    reference_chosen=jnp.asarray(-RNG.uniform(10, 60, 32)),
    reference_rejected=jnp.asarray(-RNG.uniform(10, 60, 32)),
    chosen_length=jnp.asarray(RNG.integers(3, 40, 32)),
    rejected_length=jnp.asarray(RNG.integers(3, 40, 32)),
)
A, B = np.asarray(PAIRS.chosen), np.asarray(PAIRS.rejected)
A0, B0 = np.asarray(PAIRS.reference_chosen), np.asarray(PAIRS.reference_rejected)
LW, LL = np.asarray(PAIRS.chosen_length), np.asarray(PAIRS.rejected_length)
MARGIN = (A - A0) - (B - B0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def odds_slope(x):
    return 1 / (1 - np.exp(x))


def log_odds(x):
    return x - np.log1p(-np.exp(x))


ONE = np.ones(32)
TABLE = {  # name, options, d_w, d_l: the specification's table, by hand
    "dpo": ({"beta": 0.1}, 0.1 * sigmoid(-0.1 * MARGIN), 0.1 * sigmoid(-0.1 * MARGIN)),
    "rdpo": (
        {"beta": 0.1, "alpha": 0.2},
        0.1 * sigmoid(-0.1 * MARGIN - 0.2 * (LW - LL)),
        0.1 * sigmoid(-0.1 * MARGIN - 0.2 * (LW - LL)),
    ),
    "ipo": ({"tau": 0.1}, 2 * (5 - MARGIN), 2 * (5 - MARGIN)),
    "simpo": (
        {"beta": 2.0, "gamma": 1.0},
        2 / LW * sigmoid(-(2 * A / LW - 2 * B / LL - 1)),
        2 / LL * sigmoid(-(2 * A / LW - 2 * B / LL - 1)),
    ),
    "rrhf": (
        {"lambda_": 0.5},
        (A / LW < B / LL) / LW + 0.5,
        (A / LW < B / LL) / LL,
    ),
    "slic": ({"delta": 1.0, "lambda_": 0.1}, (A - B < 1) + 0.1, (A - B < 1) * ONE),
    "cpo": (
        {"beta": 0.1, "lambda_": 1.0},
        0.1 * sigmoid(-0.1 * (A - B)) + 1,
        0.1 * sigmoid(-0.1 * (A - B)),
    ),
    "dpop": (
        {"beta": 0.1, "lambda_": 50.0},
        0.1 * (1 + 50 * (A < A0)) * sigmoid(-0.1 * (MARGIN - 50 * np.maximum(0, A0 - A))),
        0.1 * sigmoid(-0.1 * (MARGIN - 50 * np.maximum(0, A0 - A))),
    ),
    "sppo": ({"beta": 0.1}, 2 * (5 - (A - A0)), 2 * (5 + (B - B0))),
    "orpo": (
        {"lambda_": 0.1},
        1 / LW + 0.1 * sigmoid(-(log_odds(A / LW) - log_odds(B / LL))) * odds_slope(A / LW) / LW,
        0.1 * sigmoid(-(log_odds(A / LW) - log_odds(B / LL))) * odds_slope(B / LL) / LL,
    ),
    "rpo": (
        {"beta": 0.1, "alpha": 1.0},
        0.1 * sigmoid(-0.1 * MARGIN) + 1 / LW,
        0.1 * sigmoid(-0.1 * MARGIN),
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_coefficients_are_those_of_the_paper(name):
    options, chosen, rejected = TABLE[name]
    found = coefficients(PREFERENCE_LOSSES[name], PAIRS, **options)
    np.testing.assert_allclose(found.chosen, chosen, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(found.rejected, rejected, rtol=2e-4, atol=1e-6)


def test_kto_saturates_on_either_side_of_its_zero_point():
    beta, kl = 0.1, 2.0
    found = coefficients(PREFERENCE_LOSSES["kto"], PAIRS, beta=beta, kl=jnp.asarray(kl))
    u, v = beta * (A - A0 - kl), beta * (kl - (B - B0))
    np.testing.assert_allclose(found.chosen, beta * sigmoid(u) * sigmoid(-u), rtol=2e-4)
    np.testing.assert_allclose(found.rejected, beta * sigmoid(v) * sigmoid(-v), rtol=2e-4)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_every_loss_of_the_table_has_finite_ones(name):
    found = coefficients(PREFERENCE_LOSSES[name], PAIRS)
    assert np.isfinite(found.chosen).all()
    assert np.isfinite(found.rejected).all()
    assert found.ratio.shape == (32,)


def test_a_loss_of_ones_own():
    def hinge(pairs, *, width):
        return jax.nn.relu(width - pairs.chosen + 0.5 * pairs.rejected)

    found = coefficients(hinge, PAIRS, width=3.0)
    active = 3 - A + 0.5 * B > 0
    np.testing.assert_array_equal(found.chosen, active)
    np.testing.assert_array_equal(found.rejected, 0.5 * active)
