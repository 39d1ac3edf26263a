"""A step of adapters over quantised weights: that over the dequantised ones, with less memory."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.losses import PREFERENCE_LOSSES
from jaxalign.models.decoder import init_params
from jaxalign.models.lora import init_adapters
from jaxalign.models.quantised import QuantisedMatrix, dequantise, in_fewer_bits
from jaxalign.sharding import make_mesh, place, shard_batch
from jaxalign.training.objectives import Policy, PreferenceObjective, ReferencedBatch
from jaxalign.training.step import compile_step, gradients, initial_state, train_step
from tests.training.test_step import CONFIG, dense_log_probs, make_batch


def is_quantised(x):
    return isinstance(x, QuantisedMatrix)


def dequantised(tree):
    """The weights that a quantised base stands for, in float32."""
    return jax.tree.map(
        lambda x: dequantise(x) if is_quantised(x) else x, tree, is_leaf=is_quantised
    )


def objective_of(remat="none"):
    policy = Policy(config=CONFIG, adapter_scale=0.5, remat=remat)
    return PreferenceObjective(policy=policy, loss=PREFERENCE_LOSSES["dpo"], options={})


@pytest.fixture(scope="module")
def world():
    base = init_params(dataclasses.replace(CONFIG, initializer_range=0.2), jax.random.key(1))
    adapters = init_adapters(base, jax.random.key(3), rank=4, targets=("q", "down"))
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)
    batch = jax.tree.map(jnp.asarray, make_batch(np.random.default_rng(5)))
    return base, adapters, ReferencedBatch(pairs=batch, reference=None)


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_step_is_that_over_the_dequantised_weights(world, kind):
    """Losses, metrics and updates; and the reference is the dequantised base."""
    base, adapters, batch = world
    small = in_fewer_bits(base, kind, jnp.float32)
    plain, objective, optimizer = dequantised(small), objective_of(), optax.sgd(0.1)
    step = jax.jit(partial(train_step, objective=objective, optimizer=optimizer))
    state = initial_state(adapters, optimizer, seed=0)
    found, expected = (
        step(state, {"policy": tree, "reference": tree}, batch) for tree in (small, plain)
    )
    close = partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
    jax.tree.map(close, found, expected)
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), found[0].params, adapters)
    assert min(jax.tree.leaves(moved)) > 1e-5
    reference = jax.jit(objective.of_reference)(batch.pairs, small)
    np.testing.assert_allclose(reference, dense_log_probs(plain, batch.pairs), rtol=1e-4)
    rounded = np.abs(reference - dense_log_probs(base, batch.pairs)).max()
    assert rounded > 1e-4  # the two kinds of weights are not the same


@pytest.mark.slow
def test_a_step_on_a_mesh_is_that_on_one_device(world):
    base, adapters, batch = world
    small, optimizer = in_fewer_bits(base, "nf4", jnp.float32), optax.sgd(0.1)
    step = partial(train_step, objective=objective_of(), optimizer=optimizer)
    found = []
    for count, sizes in ((1, {}), (8, {"fsdp": 2, "tensor": 2})):
        mesh = make_mesh(devices=jax.devices()[:count], **sizes)
        placed = place(small, mesh)
        state = place(initial_state(adapters, optimizer, seed=0), mesh)
        run = compile_step(step, state, mesh)
        frozen = {"policy": placed, "reference": placed}
        found.append(run(state, frozen, shard_batch(batch, mesh)))
    up = placed["layers"]["up"]["kernel"]
    assert [x.sharding.shard_shape(x.shape) for x in (up.codes, up.scale)] == [
        (2, 4, 12),
        (2, 1, 12),
    ]
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, *jax.device_get(found))


@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=pytest.mark.slow)])
def test_no_program_has_the_matrices_of_all_layers_in_float(world, remat, optimised):
    base, adapters, batch = world
    small = in_fewer_bits(base, "nf4", jnp.float32)
    frozen = {"policy": small, "reference": small}

    def gradient(adapters, frozen):
        return gradients(objective_of(remat), adapters, frozen, batch, jax.random.key(0))[0]

    program = jax.jit(gradient).lower(adapters, frozen).compile()
    text = program.as_text() or ""
    assert re.search(r"\bf32\[2,16,4\]", text)  # adapters of all layers
    assert not re.search(r"\b(?:f32|bf16)\[2,(?:16,16|16,8|16,24|24,16)\]", text)
    codes = [x for x in text.splitlines() if re.search(r"= u8\[2,8,24\]\S* (?!param|get-t)", x)]
    assert not codes  # nor are the codes copied for the backward pass
    trees = small, small, adapters
    known = sum(x.nbytes for tree in trees for x in jax.tree.leaves(tree))
    assert program.memory_analysis().argument_size_in_bytes == pytest.approx(known, rel=0.01)
