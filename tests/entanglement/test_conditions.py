"""The conditions against gradients drawn at random, and against a step really taken."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.entanglement import (
    CASES,
    Coefficients,
    PairGeometry,
    band,
    case,
    coefficients,
    cosine,
    first_order_changes,
    norm_ratio,
)
from jaxalign.losses import PairLogProbs, dpo


def drawn(number=4000, dimensions=4, seed=0):
    """Vectors with all cosines and norm ratios, as g_w and g_l of pairs."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(number, dimensions))
    mix = rng.uniform(-1, 1, (number, 1))
    chosen = shared + 0.5 * rng.normal(size=shared.shape)
    rejected = (mix * shared + 0.3 * rng.normal(size=shared.shape)) * rng.lognormal(
        size=(number, 1)
    )
    geometry = PairGeometry(
        chosen=jnp.asarray((chosen**2).sum(1)),
        rejected=jnp.asarray((rejected**2).sum(1)),
        inner=jnp.asarray((chosen * rejected).sum(1)),
    )
    weights = Coefficients(
        chosen=jnp.asarray(rng.lognormal(size=number)),
        rejected=jnp.asarray(rng.lognormal(size=number)),
    )
    return chosen, rejected, geometry, weights


def test_scalars_are_those_of_the_vectors():
    chosen, rejected, geometry, _ = drawn()
    norms = np.linalg.norm(chosen, axis=1), np.linalg.norm(rejected, axis=1)
    products = (chosen * rejected).sum(1)
    np.testing.assert_allclose(cosine(geometry), products / (norms[0] * norms[1]), atol=1e-5)
    np.testing.assert_allclose(norm_ratio(geometry), norms[1] / norms[0], rtol=1e-5)


def test_changes_are_those_of_the_step():
    """The descent direction d_w g_w - d_l g_l, projected on either gradient."""
    chosen, rejected, geometry, weights = drawn()
    d_w, d_l = (np.asarray(x)[:, None] for x in (weights.chosen, weights.rejected))
    step = 0.01 * (d_w * chosen - d_l * rejected)
    changes = first_order_changes(geometry, weights, learning_rate=0.01)
    for change, gradient in zip(changes, (chosen, rejected), strict=True):
        np.testing.assert_allclose(change, (step * gradient).sum(1), rtol=1e-3, atol=1e-4)


def test_cases_by_the_papers_conditions():
    chosen, rejected, geometry, weights = drawn()
    inner = (chosen * rejected).sum(1)
    ratio = np.asarray(weights.ratio)
    rises = inner < ratio * (chosen**2).sum(1)
    falls = inner < (rejected**2).sum(1) / ratio
    names = np.array(CASES)[np.asarray(case(geometry, weights))]
    assert (names[rises & falls] == "ideal").all()
    assert (names[~rises & falls] == "both down").all()
    assert (names[rises & ~falls] == "both up").all()
    assert not (~rises & ~falls).any()
    assert {"ideal", "both down", "both up"} == set(names)


def test_the_ideal_case_is_the_band():
    _, _, geometry, weights = drawn()
    lower, upper = band(geometry)
    inside = (weights.ratio > lower) & (weights.ratio < upper)
    np.testing.assert_array_equal(inside, case(geometry, weights) == 1)
    tangled = np.asarray(cosine(geometry)) > 0
    centre = np.sqrt(np.asarray(lower * upper)[tangled])
    np.testing.assert_allclose(centre, np.asarray(norm_ratio(geometry))[tangled], rtol=1e-4)


def test_nothing_is_said_where_nothing_is_defined():
    geometry = PairGeometry(
        chosen=jnp.array([1.0, 0.0, 1.0]),
        rejected=jnp.array([1.0, 1.0, 1.0]),
        inner=jnp.array([0.5, jnp.nan, 0.5]),
    )
    weights = Coefficients(chosen=jnp.array([0.0, 1.0, -1.0]), rejected=jnp.array([0.0, 1.0, -1.0]))
    assert [CASES[i] for i in case(geometry, weights)] == ["undefined", "undefined", "reversed"]
    assert np.isnan(band(geometry)[1][1])


def test_single_tokens_are_always_ideal_under_dpo():
    """Learnable logits, one token: d log pi_w = 1 - p_w + p_l times the step, always up."""
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(50, 12)))
    log_prob = lambda z, y: jax.nn.log_softmax(z)[y]  # noqa: E731
    g_w = jax.vmap(jax.grad(lambda z: log_prob(z, 3)))(logits)
    g_l = jax.vmap(jax.grad(lambda z: log_prob(z, 7)))(logits)
    geometry = PairGeometry(
        chosen=(g_w**2).sum(1), rejected=(g_l**2).sum(1), inner=(g_w * g_l).sum(1)
    )
    p = jax.nn.softmax(logits)
    values = jax.nn.log_softmax(logits)
    lengths = jnp.ones(50, jnp.int32)
    pairs = PairLogProbs(
        chosen=values[:, 3],
        rejected=values[:, 7],
        reference_chosen=values[:, 3],
        reference_rejected=values[:, 7],
        chosen_length=lengths,
        rejected_length=lengths,
    )
    weights = coefficients(dpo, pairs, beta=0.1)
    rate = 1e-3
    up, down = first_order_changes(geometry, weights, learning_rate=rate)
    np.testing.assert_allclose(up, rate * 0.05 * (1 - p[:, 3] + p[:, 7]), rtol=1e-3)
    np.testing.assert_allclose(down, -rate * 0.05 * (1 + p[:, 3] - p[:, 7]), rtol=1e-3)
    assert (case(geometry, weights) == 1).all()
    moved = logits + rate * (weights.chosen[:, None] * g_w - weights.rejected[:, None] * g_l)
    realised = jax.nn.log_softmax(moved)[:, 3] - values[:, 3]
    np.testing.assert_allclose(realised, up, rtol=0.05)
