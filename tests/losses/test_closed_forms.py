"""Every loss and its two slopes against NumPy, at hyperparameters that are not its defaults.

The formulas are written out once more here, in float64 and by hand, slopes included: d_w is minus
the derivative in log pi_w, d_l the derivative in log pi_l. Notation: a = log pi_w, b = log pi_l,
a0 and b0 the same under the reference, lw and ll the lengths.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import PREFERENCE_LOSSES, PairLogProbs

CHOSEN = np.array([-12.0, -30.5, -7.25, -41.0, -18.0, -5.5, -22.0, -9.0])
REJECTED = np.array([-15.5, -24.0, -9.0, -38.5, -33.0, -6.0, -14.0, -12.5])
REFERENCE_CHOSEN = np.array([-13.0, -28.0, -7.0, -45.0, -18.5, -8.0, -21.0, -4.0])
REFERENCE_REJECTED = np.array([-14.0, -24.5, -9.5, -40.0, -35.0, -4.5, -17.5, -12.0])
CHOSEN_LENGTH = np.array([4, 11, 3, 20, 7, 2, 9, 5])
REJECTED_LENGTH = np.array([6, 8, 3, 12, 15, 2, 4, 10])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def logistic(x):
    """Minus the log-sigmoid, and minus its derivative."""
    return np.log1p(np.exp(-x)), sigmoid(-x)


def dpo(a, b, a0, b0, lw, ll, beta, label_smoothing):
    z = beta * ((a - a0) - (b - b0))
    value = -(1 - label_smoothing) * np.log(sigmoid(z)) - label_smoothing * np.log(sigmoid(-z))
    d = beta * ((1 - label_smoothing) * sigmoid(-z) - label_smoothing * sigmoid(z))
    return value, d, d


def robust_dpo(a, b, a0, b0, lw, ll, beta, label_smoothing):
    z, e = beta * ((a - a0) - (b - b0)), label_smoothing
    value = (-(1 - e) * np.log(sigmoid(z)) + e * np.log(sigmoid(-z))) / (1 - 2 * e)
    d = beta * ((1 - e) * sigmoid(-z) + e * sigmoid(z)) / (1 - 2 * e)
    return value, d, d


def ipo(a, b, a0, b0, lw, ll, tau):
    h = (a - a0) - (b - b0)
    d = 2 * (1 / (2 * tau) - h)
    return (h - 1 / (2 * tau)) ** 2, d, d


def ipo_mean(a, b, a0, b0, lw, ll, tau):
    h = (a - a0) / lw - (b - b0) / ll
    d = 2 * (1 / (2 * tau) - h)
    return (h - 1 / (2 * tau)) ** 2, d / lw, d / ll


def slic(a, b, a0, b0, lw, ll, delta, lambda_):
    active = (a - b < delta).astype(float)
    return active * (delta - a + b) - lambda_ * a, active + lambda_, active


def slic_norm(a, b, a0, b0, lw, ll, beta, delta):
    h = (a - a0) - (b - b0)
    active = (beta * h < delta).astype(float)
    return active * (delta - beta * h), beta * active, beta * active


def rdpo(a, b, a0, b0, lw, ll, beta, alpha):
    value, d = logistic(beta * ((a - a0) - (b - b0)) + alpha * (lw - ll))
    return value, beta * d, beta * d


def simpo(a, b, a0, b0, lw, ll, beta, gamma):
    value, d = logistic(beta * a / lw - beta * b / ll - gamma)
    return value, beta * d / lw, beta * d / ll


def cpo(a, b, a0, b0, lw, ll, beta, lambda_):
    value, d = logistic(beta * (a - b))
    return value - lambda_ * a, beta * d + lambda_, beta * d


def rrhf(a, b, a0, b0, lw, ll, lambda_):
    misranked = (a / lw < b / ll).astype(float)
    value = misranked * (b / ll - a / lw) - lambda_ * a
    return value, misranked / lw + lambda_, misranked / ll


def dpop(a, b, a0, b0, lw, ll, beta, lambda_):
    value, d = logistic(beta * ((a - a0) - (b - b0) - lambda_ * np.maximum(0, a0 - a)))
    return value, beta * (1 + lambda_ * (a < a0)) * d, beta * d


def kto(a, b, a0, b0, lw, ll, beta, lambda_desirable, lambda_undesirable):
    zero = beta * max(0.0, np.concatenate([a - a0, b - b0]).mean())
    u, v = beta * (a - a0) - zero, zero - beta * (b - b0)
    value = lambda_desirable * (1 - sigmoid(u)) + lambda_undesirable * (1 - sigmoid(v))
    d_w = lambda_desirable * beta * sigmoid(u) * sigmoid(-u)
    return value, d_w, lambda_undesirable * beta * sigmoid(v) * sigmoid(-v)


def sppo(a, b, a0, b0, lw, ll, beta):
    target = 1 / (2 * beta)
    value = (a - a0 - target) ** 2 + (b - b0 + target) ** 2
    return value, 2 * (target - (a - a0)), 2 * (target + (b - b0))


def orpo(a, b, a0, b0, lw, ll, lambda_):
    p, q = np.exp(a / lw), np.exp(b / ll)
    value, d = logistic(np.log(p / (1 - p)) - np.log(q / (1 - q)))
    d_w = 1 / lw + lambda_ * d / (lw * (1 - p))
    return -a / lw + lambda_ * value, d_w, lambda_ * d / (ll * (1 - q))


def rpo(a, b, a0, b0, lw, ll, beta, alpha):
    value, d = logistic(beta * ((a - a0) - (b - b0)))
    return value - alpha * a / lw, beta * d + alpha / lw, beta * d


def apo_zero(a, b, a0, b0, lw, ll, beta):
    p, q = sigmoid(beta * (a - a0)), sigmoid(beta * (b - b0))
    return 1 - p + q, beta * p * (1 - p), beta * q * (1 - q)


def apo_down(a, b, a0, b0, lw, ll, beta):
    p, s = sigmoid(beta * (a - a0)), sigmoid(beta * ((a - a0) - (b - b0)))
    return p + 1 - s, beta * (s * (1 - s) - p * (1 - p)), beta * s * (1 - s)


def exo(a, b, a0, b0, lw, ll, beta, label_smoothing):
    p = sigmoid(beta * ((a - a0) - (b - b0)))
    value = p * np.log(p / (1 - label_smoothing)) + (1 - p) * np.log((1 - p) / label_smoothing)
    d_p = np.log(p / (1 - label_smoothing)) - np.log((1 - p) / label_smoothing)
    return value, -beta * p * (1 - p) * d_p, -beta * p * (1 - p) * d_p


def nca(a, b, a0, b0, lw, ll, beta):
    p, q = sigmoid(beta * (a - a0)), sigmoid(beta * (b - b0))
    value = -np.log(p) - np.log(1 - p) / 2 - np.log(1 - q) / 2
    return value, beta * ((1 - p) - p / 2), beta * q / 2


def bco(a, b, a0, b0, lw, ll, beta):
    delta = beta * np.concatenate([a - a0, b - b0]).mean()
    p, q = sigmoid(beta * (a - a0) - delta), sigmoid(beta * (b - b0) - delta)
    return -np.log(p) - np.log(1 - q), beta * (1 - p), beta * q


def discopop(a, b, a0, b0, lw, ll, beta, tau):
    z = beta * ((a - a0) - (b - b0))
    m = sigmoid(z / tau)
    value = -(1 - m) * np.log(sigmoid(z)) + m * np.exp(-z)
    d_m = m * (1 - m) / tau
    slope = d_m * np.log(sigmoid(z)) - (1 - m) * sigmoid(-z) + (d_m - m) * np.exp(-z)
    return value, -beta * slope, -beta * slope


def cal_dpo(a, b, a0, b0, lw, ll, beta):
    target = 1 / (2 * beta)
    value, d = logistic((a - a0) - (b - b0))
    value = value + ((a - a0 - target) ** 2 + (b - b0 + target) ** 2) / 2
    return value, d + target - (a - a0), d + target + (b - b0)


def dpo_shift(a, b, a0, b0, lw, ll, beta, lambda_):
    value, d = logistic(beta * (a - a0) - lambda_ * beta * (b - b0))
    return value, beta * d, lambda_ * beta * d


def minor_dpo(a, b, a0, b0, lw, ll, beta):
    value, d = logistic(beta * (a - a0) - beta * np.maximum(0, b - b0))
    return value, beta * d, beta * d * (b > b0)


def bdpo(a, b, a0, b0, lw, ll, beta, lambda_):
    mixture = lambda_ * np.exp(b) + (1 - lambda_) * np.exp(b0)
    value, d = logistic(beta * (a - a0) - beta * np.log(mixture / np.exp(b0)))
    return value, beta * d, beta * d * lambda_ * np.exp(b) / mixture


def mappo(a, b, a0, b0, lw, ll, beta, delta_r):
    value, d = logistic(beta * (a - a0) - delta_r * beta * (b - b0))
    return value, beta * d, delta_r * beta * d


def simper(a, b, a0, b0, lw, ll):
    return np.exp(b / ll) - np.exp(a / lw), np.exp(a / lw) / lw, np.exp(b / ll) / ll


def sft(a, b, a0, b0, lw, ll):
    return -a / lw, 1 / lw, np.zeros_like(a)


def beta_dpo(a, b, a0, b0, lw, ll, beta, alpha, threshold):
    h = (a - a0) - (b - b0)
    used = max(beta * (1 + alpha * (h.mean() - threshold)), 1e-3)
    value, d = logistic(used * h)
    return value, used * d, used * d


def alpha_dpo(a, b, a0, b0, lw, ll, beta, gamma, alpha):
    m = (a - a0) / lw - (b - b0) / ll
    target = alpha * (m - m.mean()) / m.std() + gamma / beta
    value, d = logistic(beta * (a / lw - b / ll - target))
    return value, beta * d / lw, beta * d / ll


def aot(a, b, a0, b0, lw, ll, beta, label_smoothing):
    rank = (a - b).argsort().argsort()
    z = beta * ((a - b) - np.sort(a0 - b0)[rank])
    value = -(1 - label_smoothing) * np.log(sigmoid(z)) - label_smoothing * np.log(sigmoid(-z))
    d = beta * ((1 - label_smoothing) * sigmoid(-z) - label_smoothing * sigmoid(z))
    return value, d, d


def sigmoid_norm(a, b, a0, b0, lw, ll, beta):
    value, d = logistic(beta * ((a - a0) / lw - (b - b0) / ll))
    return value, beta * d / lw, beta * d / ll


PER_PAIR_GAP = np.array([0.1, 0.9, 0.4, 1.0, 0.0, 0.5, 0.7, 0.2])


def scit(a, b, a0, b0, lw, ll):
    p, q = np.exp(a - b) / (1 + np.exp(a - b)), 1 / (1 + np.exp(a - b))
    return -a - np.log(p), 1 + q, q


def scit_mean(a, b, a0, b0, lw, ll, label_smoothing):
    e, p = label_smoothing, np.exp(a / lw) / (np.exp(a / lw) + np.exp(b / ll))
    value = -a / lw - (1 - e) * np.log(p) - e * np.log(1 - p)
    return value, (1 + (1 - e) * (1 - p) - e * p) / lw, ((1 - e) * (1 - p) - e * p) / ll


def stable_alignment(a, b, a0, b0, lw, ll, gap, margin, ratio, scale):
    lead = b / ll - a / lw + gap / scale * margin
    active = (lead > 0).astype(float)
    return -a / lw + ratio * active * lead, (1 + ratio * active) / lw, ratio * active / ll


CASES = [
    (dpo, {"beta": 0.3, "label_smoothing": 0.2}),
    (robust_dpo, {"beta": 0.3, "label_smoothing": 0.2}),
    (ipo, {"tau": 0.4}),
    (ipo_mean, {"tau": 0.4}),
    (slic, {"delta": 4.0, "lambda_": 0.3}),
    (slic, {"delta": 1.0, "lambda_": 0.0}),
    (slic_norm, {"beta": 0.5, "delta": 2.0}),
    (rdpo, {"beta": 0.3, "alpha": 0.07}),
    (simpo, {"beta": 3.0, "gamma": 0.7}),
    (cpo, {"beta": 0.2, "lambda_": 0.4}),
    (rrhf, {"lambda_": 0.4}),
    (dpop, {"beta": 0.3, "lambda_": 2.5}),
    (kto, {"beta": 0.3, "lambda_desirable": 1.4, "lambda_undesirable": 0.6}),
    (sppo, {"beta": 0.05}),
    (orpo, {"lambda_": 0.7}),
    (rpo, {"beta": 0.3, "alpha": 0.6}),
    (apo_zero, {"beta": 0.3}),
    (apo_down, {"beta": 0.3}),
    (exo, {"beta": 0.3, "label_smoothing": 0.05}),
    (nca, {"beta": 0.3}),
    (bco, {"beta": 0.3}),
    (discopop, {"beta": 0.3, "tau": 0.4}),
    (cal_dpo, {"beta": 0.05}),
    (dpo_shift, {"beta": 0.3, "lambda_": 0.7}),
    (minor_dpo, {"beta": 0.3}),
    (bdpo, {"beta": 0.3, "lambda_": 0.8}),
    (mappo, {"beta": 0.3, "delta_r": 0.35}),
    (mappo, {"beta": 0.3, "delta_r": PER_PAIR_GAP}),
    (simper, {}),
    (sft, {}),
    (beta_dpo, {"beta": 0.3, "alpha": 0.2, "threshold": -1.5}),
    (beta_dpo, {"beta": 0.3, "alpha": 2.0, "threshold": 40.0}),  # held at the smallest beta
    (alpha_dpo, {"beta": 3.0, "gamma": 0.7, "alpha": 0.4}),
    (aot, {"beta": 0.3, "label_smoothing": 0.2}),
    (sigmoid_norm, {"beta": 3.0}),
    (scit, {}),
    (scit_mean, {"label_smoothing": 0.1}),
    (stable_alignment, {"gap": 2.0, "margin": 1.5, "ratio": 0.3, "scale": 6.0}),
    (stable_alignment, {"gap": PER_PAIR_GAP, "margin": 0.4, "ratio": 0.3, "scale": 1.0}),
]


def pairs_of_the_table():
    return PairLogProbs(
        chosen=jnp.asarray(CHOSEN),
        rejected=jnp.asarray(REJECTED),
        reference_chosen=jnp.asarray(REFERENCE_CHOSEN),
        reference_rejected=jnp.asarray(REFERENCE_REJECTED),
        chosen_length=jnp.asarray(CHOSEN_LENGTH),
        rejected_length=jnp.asarray(REJECTED_LENGTH),
    )


def slopes(loss, pairs):
    """(d_w, d_l), one row per pair."""

    def total(chosen, rejected):
        return loss(replace(pairs, chosen=chosen, rejected=rejected)).sum()

    in_chosen, in_rejected = jax.grad(total, argnums=(0, 1))(pairs.chosen, pairs.rejected)
    return -in_chosen, in_rejected


@pytest.mark.parametrize(
    ("expected", "options"),
    CASES,
    ids=[f"{form.__name__}-{i}" for i, (form, _) in enumerate(CASES)],
)
def test_value_and_both_slopes(expected, options):
    log_probs = (CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED)
    value, d_chosen, d_rejected = expected(*log_probs, CHOSEN_LENGTH, REJECTED_LENGTH, **options)
    with jax.enable_x64(True):
        pairs = pairs_of_the_table()
        options = {
            name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()
        }

        def loss(pairs):
            return PREFERENCE_LOSSES[expected.__name__](pairs, **options)

        found = slopes(loss, pairs)
        # alpha_dpo keeps its spread from zero by adding 1e-6, which is felt here.
        rtol = 1e-5 if expected is alpha_dpo else 1e-10
        np.testing.assert_allclose(loss(pairs), value, rtol=rtol)
        np.testing.assert_allclose(found[0], d_chosen, rtol=rtol, atol=1e-14)
        np.testing.assert_allclose(found[1], d_rejected, rtol=rtol, atol=1e-14)


def test_every_loss_has_its_closed_form_here():
    assert {form.__name__ for form, _ in CASES} == set(PREFERENCE_LOSSES)


def test_both_sides_of_every_kink_are_in_the_fixture():
    a, b, a0, b0 = CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED
    for condition in (
        a < a0,
        b < b0,
        a - b < 4,
        0.5 * ((a - a0) - (b - b0)) < 2,
        a / CHOSEN_LENGTH < b / REJECTED_LENGTH,
    ):
        assert 0 < condition.sum() < len(condition)


def test_the_fixture_has_a_positive_zero_point():
    """Else KTO's estimate of the divergence would be clipped, and its mean untested."""
    log_ratios = np.concatenate([CHOSEN - REFERENCE_CHOSEN, REJECTED - REFERENCE_REJECTED])
    assert log_ratios.mean() > 0
