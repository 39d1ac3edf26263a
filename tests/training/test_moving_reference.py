"""References that follow the policy, against the recursion of the paper written out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.entanglement.masks import initial_head
from jaxalign.models.decoder import init_params
from jaxalign.models.lora import init_adapters, merge
from jaxalign.records import record
from jaxalign.sharding import make_mesh, place
from jaxalign.training.checkpoints import Checkpoints
from jaxalign.training.masking import HEAD
from jaxalign.training.moving_reference import MovingReference
from jaxalign.training.objectives import Policy, PreferenceObjective, ReferencedBatch
from jaxalign.training.pair_probe import PairProbe
from jaxalign.training.step import TrainState, compile_step, initial_state, saved_fields, train_step
from tests.training.test_step import CONFIG, PREFERENCE_LOSSES, assert_trees_close, make_batch

POLICY = Policy(config=CONFIG)


def objective_with(policy):
    return PreferenceObjective(policy=policy, loss=PREFERENCE_LOSSES["dpo"], options={"beta": 0.5})


@pytest.fixture
def batch(rng):
    return ReferencedBatch(pairs=jax.tree.map(jnp.asarray, make_batch(rng)), reference=None)


def run(trained, frozen, batch, moving, steps, **options):
    """The states before and after each of some steps, and the metrics of these."""
    mesh, optimizer = make_mesh(devices=jax.devices()[:1]), optax.sgd(0.5)
    objective = objective_with(moving.policy)
    step = partial(train_step, objective=objective, optimizer=optimizer, moving=moving, **options)
    state = place(initial_state(trained, optimizer, seed=0, moving=moving), mesh)
    compiled = compile_step(step, state, mesh)
    states, metrics = [jax.tree.map(jnp.array, state)], []
    for _ in range(steps):
        state, now = compiled(state, frozen, batch)
        states.append(jax.tree.map(jnp.array, state))
        metrics.append({name: float(x.value()) for name, x in now.items() if hasattr(x, "value")})
    return states, metrics


@pytest.mark.parametrize(("every", "rate"), [(2, 0.6), (1, 0.1), (2, 1.0)])
def test_the_reference_is_that_of_the_recursion(batch, every, rate):
    params = init_params(CONFIG, jax.random.key(1))
    moving = MovingReference(policy=POLICY, every=every, rate=rate)
    states, metrics = run(params, {"policy": None, "reference": None}, batch, moving, 4)
    expected = jax.device_get(params)
    for number, state in enumerate(states[1:], start=1):
        if number % every == 0:
            mean = lambda new, old: rate * np.float64(new) + (1 - rate) * np.float64(old)  # noqa: E731
            expected = jax.tree.map(mean, state.params, expected)
        assert_trees_close(state.reference, expected, rtol=1e-6, atol=1e-7)
    objective = objective_with(POLICY)
    for before, seen in zip(states, metrics, strict=False):  # the step reads the reference it has
        frozen = {"policy": None, "reference": before.reference}
        outputs = objective.forward(before.params, frozen, batch, None)
        loss, _ = objective.reduce(outputs, batch, objective.count(batch))
        np.testing.assert_allclose(seen["loss"], loss, rtol=1e-5)
    at_sync = metrics[every]["loss"]  # of the step after the first move
    assert (at_sync == pytest.approx(np.log(2), rel=1e-5)) == (rate == 1.0)


def test_adapters_are_synchronised_without_a_copy_of_the_weights(batch):
    base = init_params(CONFIG, jax.random.key(1))
    adapters = init_adapters(base, jax.random.key(3), rank=2, targets=("q", "down"))
    policy = Policy(config=CONFIG, adapter_scale=0.5)
    moving = MovingReference(policy=policy, every=2)
    states, metrics = run(adapters, {"policy": base, "reference": None}, batch, moving, 4)
    assert jax.tree.structure(states[-1].reference) == jax.tree.structure(states[-1].params)
    assert_trees_close(states[3].reference, states[2].params, rtol=0, atol=0)
    frozen = {"policy": base, "reference": merge(base, states[2].params, 0.5)}
    objective = objective_with(policy)
    outputs = objective.forward(states[3].params, frozen, batch, None)
    loss, _ = objective.reduce(outputs, batch, objective.count(batch))
    np.testing.assert_allclose(metrics[3]["loss"], loss, rtol=1e-4)
    assert metrics[2]["loss"] == pytest.approx(np.log(2), rel=1e-5)


def test_a_probed_step_moves_the_reference_too(batch):
    params = init_params(CONFIG, jax.random.key(1))
    moving = MovingReference(policy=POLICY, every=1, rate=0.3)
    frozen = {"policy": None, "reference": None}
    probe = PairProbe(objective=objective_with(POLICY), realised=True)
    plain, probed = (
        run(params, frozen, batch, moving, 2, **options)[0][-1]
        for options in ({}, {"backward": probe})
    )
    assert_trees_close(probed.reference, plain.reference, rtol=1e-4, atol=1e-5)


def test_a_mask_is_no_part_of_the_reference():
    params = init_params(CONFIG, jax.random.key(1))
    trained = {**params, HEAD: initial_head(CONFIG.width, CONFIG.vocab_size)}
    moving = MovingReference(policy=POLICY, every=1)
    assert set(moving.start(trained)) == set(params)
    moved = moving.moved(moving.start(trained), trained, jnp.int32(1))
    assert set(moved) == set(params)


def test_a_fixed_reference_is_no_part_of_the_state():
    params = init_params(CONFIG, jax.random.key(1))
    state = initial_state(params, optax.sgd(0.1), seed=0)
    assert state.reference is None
    assert set(saved_fields(state)) == {
        *("step", "params", "opt_state", "key", "skipped", "running"),  # as before it could move
    }
    moving = MovingReference(policy=POLICY, every=1)
    assert "reference" in saved_fields(initial_state(params, optax.sgd(0.1), seed=0, moving=moving))


def test_a_checkpoint_of_an_earlier_version_is_restored(tmp_path):
    """It is of a record with these fields and no reference."""

    @record
    class Earlier:
        step: object
        params: object
        opt_state: object
        key: object
        skipped: object
        running: object

    mesh, params = make_mesh(), {"a": {"kernel": jnp.arange(64.0).reshape(8, 8)}}
    state = place(initial_state(params, optax.adam(0.1), seed=0), mesh)
    with Checkpoints(tmp_path / "preference") as checkpoints:
        checkpoints.save(3, Earlier(**saved_fields(state)), {"step": 3})
        checkpoints.wait()
        fields, _ = checkpoints.restore(3, saved_fields(state), mesh)
    restored = TrainState(**fields)
    assert_trees_close(restored.params, params, rtol=0, atol=0)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
