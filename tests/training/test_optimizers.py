"""Schedules at hand-computed points; decay leaves norms alone; clipping bounds the update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.training.optimizers import OPTIMIZERS, make_optimizer, make_schedule


def test_linear_schedule_rises_and_falls():
    rate = make_schedule(learning_rate=1.0, steps=13, schedule="linear", warmup_steps=3)
    np.testing.assert_allclose([rate(i) for i in range(4)], [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose([rate(8), rate(13)], [0.5, 0.0], atol=1e-6)


def test_cosine_schedule_ends_at_its_fraction():
    rate = make_schedule(learning_rate=2.0, steps=10, schedule="cosine", final_fraction=0.1)
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [2.0, 1.1, 0.2], rtol=1e-6)


def tree(value):
    return {
        "q": {"kernel": jnp.full((2, 2), value)},
        "attention_norm": {"scale": jnp.full(2, value)},
    }


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "rmsprop"])
def test_decay_moves_matrices_and_not_norms(name):
    optimizer = make_optimizer(name, 0.1, weight_decay=0.5)
    params, zeros = tree(1.0), tree(0.0)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert (np.asarray(updates["q"]["kernel"]) < 0).all()
    np.testing.assert_array_equal(updates["attention_norm"]["scale"], 0.0)


def test_sgd_takes_the_clipped_gradient():
    optimizer = make_optimizer("sgd", 1.0, clip_norm=1.0)
    gradient = {"q": {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]])}}
    updates, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
    np.testing.assert_allclose(updates["q"]["kernel"], [[-0.6, 0], [0, -0.8]], rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_down_a_parabola(name):
    optimizer = make_optimizer(name, 0.05, clip_norm=None)
    params = {"q": {"kernel": jnp.full((4, 4), 2.0)}}
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        gradient = jax.grad(lambda p: (p["q"]["kernel"] ** 2).sum())(params)
        updates, state = optimizer.update(gradient, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    for _ in range(200):
        params, state = step(params, state)
    assert float(jnp.abs(params["q"]["kernel"]).max()) < 0.2


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match=r"adam.*is not one of adamw"):
        make_optimizer("adam", 0.1)
    with pytest.raises(UserError, match="schedule"):
        make_schedule(learning_rate=1.0, steps=2, schedule="cubic")
