"""The parts of the ledger against explicit gradients and finite differences, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.entanglement import Coefficients, PairGeometry
from jaxalign.entanglement.ledger import changes, own_changes, rate_along, token_changes

PAIRS, TOKENS, WIDTH, WORDS = 5, 4, 3, 7


@pytest.fixture
def world(rng):
    """Log-probs of a two-layer network in float64, and the loss of their pairs."""
    with jax.enable_x64(True):
        states = jnp.asarray(rng.normal(size=(PAIRS, 2, TOKENS, WIDTH)))
        targets = jnp.asarray(rng.integers(0, WORDS, (PAIRS, 2, TOKENS, 1)))
        params = {
            "in": jnp.asarray(rng.normal(size=(WIDTH, 6))),
            "out": jnp.asarray(rng.normal(size=(6, WORDS))),
        }
        weight = jnp.asarray(rng.uniform(0.5, 2.0, PAIRS))
        yield states, targets, params, weight


def log_probs(params, states, targets):
    scores = jax.nn.log_softmax(jnp.tanh(states @ params["in"]) @ params["out"])
    return jnp.take_along_axis(scores, targets, axis=-1)[..., 0]


def explicit(world, update):
    """Every part from every response's own gradient."""
    states, targets, params, weight = world

    def of_responses(params):
        return log_probs(params, states, targets).sum(-1)

    def loss(values):
        return jnp.sum(weight * jax.nn.softplus(-0.1 * (values[:, 0] - values[:, 1]))) / sum(weight)

    values = of_responses(params)
    slopes = jax.grad(loss)(values)
    tree = jax.jacrev(of_responses)(params)
    rows = np.concatenate([x.reshape(PAIRS, 2, -1) for x in jax.tree.leaves(tree)], axis=-1)
    step = np.concatenate([x.ravel() for x in jax.tree.leaves(update)])
    descent = -np.einsum("ps,psn->n", slopes, rows)
    rate = step @ descent / (descent @ descent)
    own = rate * np.einsum("psn,pn->ps", rows, -np.einsum("ps,psn->pn", slopes, rows))
    after = of_responses(jax.tree.map(jnp.add, params, update))
    parts = {
        "own": own,
        "others": rate * rows @ descent - own,
        "optimiser": rows @ (step - rate * descent),
        "curvature": after - values - rows @ step,
    }
    fraction = weight / sum(weight)
    observed = {
        "geometry": PairGeometry(
            chosen=jnp.asarray((rows[:, 0] ** 2).sum(-1)),
            rejected=jnp.asarray((rows[:, 1] ** 2).sum(-1)),
            inner=jnp.asarray((rows[:, 0] * rows[:, 1]).sum(-1)),
        ),
        "weights": Coefficients(chosen=-slopes[:, 0] / fraction, rejected=slopes[:, 1] / fraction),
        "fraction": fraction,
    }
    gradient = jax.grad(lambda p: loss(of_responses(p)))(params)
    return parts, observed, gradient, after - values


def measured(world, update, gradient, observed=None):
    states, targets, params, _ = world
    after = jax.tree.map(jnp.add, params, update)
    rate = rate_along(update, gradient)
    tokens = token_changes(lambda p: log_probs(p, states, targets), params, after, gradient, rate)
    return changes(tokens, own_changes(**observed, rate=rate) if observed else None), tokens


def random_update(world, rng, scale=0.1):
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape)), world[2])


def test_every_part_is_that_of_explicit_gradients(world, rng):
    update = random_update(world, rng)
    parts, observed, gradient, realised = explicit(world, update)
    found, tokens = measured(world, update, gradient, observed)
    for name, values in parts.items():
        np.testing.assert_allclose(getattr(found, name), values, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.realised, realised, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(tokens.realised.sum(-1), realised, rtol=1e-12, atol=1e-14)


def test_first_order_is_the_finite_difference(world, rng):
    states, targets, params, _ = world
    update = random_update(world, rng)
    _, _, gradient, _ = explicit(world, update)
    _, tokens = measured(world, update, gradient)
    small = 1e-5

    def at(scale):
        moved = jax.tree.map(lambda p, u: p + scale * u, params, update)
        return log_probs(moved, states, targets)

    difference = (at(small) - at(-small)) / (2 * small)
    np.testing.assert_allclose(tokens.gradient + tokens.optimiser, difference, rtol=1e-6, atol=1e-9)


def test_gradient_descent_has_no_optimiser_part_and_less_curvature_at_a_lower_rate(world):
    _, _, gradient, _ = explicit(world, world[2])
    fractions = []
    for rate in (1e-2, 1e-3, 1e-4):
        update = jax.tree.map(lambda x, rate=rate: -rate * x, gradient)
        np.testing.assert_allclose(rate_along(update, gradient), rate, rtol=1e-12)
        found, _ = measured(world, update, gradient)
        np.testing.assert_allclose(found.optimiser, 0.0, atol=1e-14)
        fractions.append(np.abs(found.curvature / found.realised).max())
    np.testing.assert_allclose(np.divide(fractions[:-1], fractions[1:]), 10.0, rtol=0.02)


def test_an_update_across_the_gradient_is_the_optimisers_alone(world, rng):
    """Momentum of other batches, say: nothing of it comes from this batch's pairs."""
    _, _, gradient, _ = explicit(world, world[2])
    update = random_update(world, rng)
    along = rate_along(update, gradient)
    update = jax.tree.map(lambda u, g: u + along * g, update, gradient)
    _, observed, _, _ = explicit(world, update)
    found, _ = measured(world, update, gradient, observed)
    np.testing.assert_allclose(found.own, 0.0, atol=1e-14)
    np.testing.assert_allclose(found.others, 0.0, atol=1e-14)
    no_gradient = jax.tree.map(jnp.zeros_like, gradient)
    found, _ = measured(world, update, no_gradient)
    np.testing.assert_allclose(found.others, 0.0)
    assert jnp.isfinite(found.realised).all()


def test_a_resting_coefficient_needs_no_geometry():
    """A hinge at rest has d_l = 0, and its probe gives no norm of the rejected gradient."""
    nan = jnp.full(1, jnp.nan)
    half_known = PairGeometry(chosen=jnp.full(1, 4.0), rejected=nan, inner=nan)
    weights = Coefficients(chosen=jnp.full(1, 3.0), rejected=jnp.zeros(1))
    own = own_changes(half_known, weights, jnp.full(1, 0.5), jnp.float32(0.1))
    np.testing.assert_allclose(own[0, 0], 0.6)
    assert jnp.isnan(own[0, 1])
    nothing = PairGeometry(chosen=nan, rejected=nan, inner=nan)
    resting = Coefficients(chosen=jnp.zeros(1), rejected=jnp.zeros(1))
    own = own_changes(nothing, resting, jnp.full(1, 0.5), jnp.float32(0.1))
    np.testing.assert_array_equal(own, 0.0)
