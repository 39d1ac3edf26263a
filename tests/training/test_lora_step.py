"""A step with adapters: they alone are trained, and the base is the reference."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.losses import PREFERENCE_LOSSES
from jaxalign.models.decoder import init_params
from jaxalign.models.lora import init_adapters, merge
from jaxalign.training.objectives import Policy, PreferenceObjective, ReferencedBatch
from jaxalign.training.step import gradients, initial_state, train_step
from tests.training.test_step import CONFIG, dense_log_probs, make_batch

SCALE = 0.5


@pytest.fixture
def world(rng):
    base = init_params(CONFIG, jax.random.key(1))
    adapters = init_adapters(base, jax.random.key(3), rank=4, targets=("q", "down"))
    batch = jax.tree.map(jnp.asarray, make_batch(rng))
    return base, adapters, ReferencedBatch(pairs=batch, reference=None)


def objective_of(dropout=0.0, **options):
    policy = Policy(config=CONFIG, adapter_scale=SCALE, adapter_dropout=dropout)
    return PreferenceObjective(policy=policy, loss=PREFERENCE_LOSSES["dpo"], options=options)


def test_the_policy_is_the_merged_model_and_the_reference_the_base(world):
    base, adapters, batch = world
    frozen = {"policy": base, "reference": base}
    outputs = objective_of().forward(adapters, frozen, batch, None)
    np.testing.assert_allclose(outputs.policy_log_probs, outputs.reference_log_probs, rtol=1e-6)
    moved = jax.tree.map(lambda x: x + 0.1, adapters)
    outputs = objective_of().forward(moved, frozen, batch, None)
    expected = dense_log_probs(merge(base, moved, SCALE), batch.pairs)
    np.testing.assert_allclose(outputs.policy_log_probs, expected, rtol=1e-4)
    np.testing.assert_allclose(
        outputs.reference_log_probs, dense_log_probs(base, batch.pairs), rtol=1e-4
    )


def test_the_gradient_is_that_of_the_formula_through_the_merged_model(world):
    base, adapters, batch = world
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)
    reference = dense_log_probs(base, batch.pairs)

    def plain(adapters):
        ratio = dense_log_probs(merge(base, adapters, SCALE), batch.pairs) - reference
        losses = jnp.log1p(jnp.exp(-0.1 * (ratio[:, 0] - ratio[:, 1])))
        return losses[:-1].mean()

    frozen = {"policy": base, "reference": base}
    grads, _, _ = gradients(objective_of(), adapters, frozen, batch, jax.random.key(0))
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), grads, jax.grad(plain)(adapters)
    )


def test_steps_train_the_adapters_alone(world):
    """The state holds adapters and their moments only, and their dropout does not stop them."""
    base, adapters, batch = world
    frozen = {"policy": base, "reference": base}
    optimizer = optax.adam(0.1)
    state = initial_state(adapters, optimizer, seed=0)
    objective = objective_of(dropout=0.2, beta=2.0)
    step = jax.jit(partial(train_step, objective=objective, optimizer=optimizer))
    losses = []
    for _ in range(8):
        state, metrics = step(state, frozen, batch)[:2]
        losses.append(float(metrics["loss"].value()))
    assert jax.tree.structure(state.params) == jax.tree.structure(adapters)
    np.testing.assert_allclose(losses[0], np.log(2), rtol=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), state.params, adapters)
    assert min(jax.tree.leaves(moved)) > 0.01
