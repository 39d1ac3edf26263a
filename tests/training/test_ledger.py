"""The ledger of a step: its parts add up, and each is what explicit gradients say."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.entanglement.ledger import PARTS
from jaxalign.losses import BATCH_COUPLED, PREFERENCE_LOSSES
from jaxalign.models import devices
from jaxalign.models.decoder import init_params
from jaxalign.models.lora import init_adapters
from jaxalign.sharding import make_mesh, place
from jaxalign.training.gradients import RECORDS
from jaxalign.training.ledger import BATCH, HELD_OUT
from jaxalign.training.objectives import Policy, PreferenceObjective, ReferencedBatch
from jaxalign.training.optimizers import make_optimizer
from jaxalign.training.pair_probe import PairProbe
from jaxalign.training.step import compile_step, initial_state, train_step
from tests.training.test_packed_pairs import CONFIG as PACKED_CONFIG
from tests.training.test_packed_pairs import packed_batches
from tests.training.test_step import CONFIG, make_batch, objective_of, with_joint_rows

REAL = slice(0, 7)  # the eighth pair is a filler


@pytest.fixture
def world(rng):
    params = init_params(CONFIG, jax.random.key(1))
    frozen = {"policy": None, "reference": init_params(CONFIG, jax.random.key(2))}
    return params, frozen, jax.tree.map(jnp.asarray, make_batch(rng))


def kept(objective, optimizer, params, frozen, batch, *, steps=1, **options):
    """The entries of the last step, and the parameters around it."""
    step = jax.jit(
        partial(
            train_step,
            objective=objective,
            optimizer=optimizer,
            backward=PairProbe(objective=objective, ledger=True),
            **options,
        )
    )
    state = initial_state(params, optimizer, seed=0)
    for _ in range(steps):
        before = state.params
        state, metrics = step(state, frozen, ReferencedBatch(pairs=batch, reference=None))
    return metrics, before, state.params


def explicit(objective, frozen, batch, before, after):
    """Every part from dense gradients of every response, in float64 once they are there."""
    referenced = ReferencedBatch(pairs=batch, reference=None)

    def outputs(trained):
        return objective.forward(trained, frozen, referenced, None)

    def loss(log_probs):
        out = dataclasses.replace(outputs(before), policy_log_probs=log_probs)
        return objective.reduce(out, referenced, objective.count(referenced))[0]

    @jax.jit
    def all_of_it(before):
        values = outputs(before).policy_log_probs
        rows = jax.jacrev(lambda p: outputs(p).policy_log_probs)(before)
        return values, rows, jax.grad(loss)(values)

    values, rows, slopes = jax.device_get(all_of_it(before))
    pairs = len(values)
    rows, step = (
        np.concatenate([np.float64(x).reshape(*shape, -1) for x in jax.tree.leaves(tree)], axis=-1)
        for tree, shape in (
            (rows, (pairs, 2)),
            (jax.tree.map(lambda a, b: np.float64(b) - np.float64(a), before, after), ()),
        )
    )
    descent = -np.einsum("ps,psn->n", slopes, rows)
    rate = step @ descent / (descent @ descent)
    own = rate * np.einsum("psn,pn->ps", rows, -np.einsum("ps,psn->pn", slopes, rows))
    realised = np.asarray(jax.jit(outputs)(after).policy_log_probs, np.float64) - values
    return {
        "own": own,
        "others": rate * rows @ descent - own,
        "optimiser": rows @ (step - rate * descent),
        "curvature": realised - rows @ step,
        "realised": realised,
    }


def assert_parts(changes, expected, *, rows=REAL, rtol=1e-3, atol=1e-4):
    for name, values in expected.items():
        found = np.asarray(getattr(changes, name))[rows]
        np.testing.assert_allclose(found, values[rows], rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize(("name", "parts"), [("simpo", 1), ("kto", 4)])
def test_the_parts_are_those_of_explicit_gradients(world, name, parts):
    """Of AdamW with momentum, decay and clipping, in its second step."""
    params, frozen, batch = world
    objective = objective_of(name)
    assert objective.coupled == (name in BATCH_COUPLED)
    rule = make_optimizer("adamw", 1e-2, weight_decay=0.1, clip_norm=0.5)
    metrics, before, after = kept(
        objective, rule, params, frozen, batch, steps=2, micro_batches=parts
    )
    changes = metrics[RECORDS][BATCH].changes
    expected = explicit(objective, frozen, batch, before, after)
    assert np.abs(expected["optimiser"][REAL]).max() > 0.01
    assert np.abs(expected["curvature"][REAL]).max() > 0.01
    assert_parts(changes, expected)
    total = sum(np.asarray(getattr(changes, part)) for part in PARTS)
    largest = sum(np.abs(np.asarray(getattr(changes, part))) for part in PARTS)
    difference = np.abs(total - expected["realised"])[REAL]
    assert (difference <= 1e-5 * largest[REAL] + 3e-6).all()  # log-probs of 20 nats in float32
    for side, label in enumerate(("chosen", "rejected")):
        for part in PARTS:
            mean = metrics[f"entanglement/ledger/{part}_{label}"].value()
            own = np.asarray(getattr(changes, part))[REAL, side]
            np.testing.assert_allclose(mean, own.mean(), rtol=1e-5, atol=1e-6)
    assert metrics["entanglement/ledger/undefined"].value() == 0


def test_gradient_descent_has_no_optimiser_part_even_if_clipped(world):
    params, frozen, batch = world
    for clip in (None, 1e-2):
        rule = make_optimizer("sgd", 0.1 if clip is None else 10.0, clip_norm=clip)
        metrics, _, _ = kept(objective_of("dpo"), rule, params, frozen, batch)
        changes = metrics[RECORDS][BATCH].changes
        size = np.abs(changes.realised[REAL]).max()
        np.testing.assert_allclose(changes.optimiser[REAL] / size, 0.0, atol=1e-5)


def test_a_pair_alone_has_no_others(world):
    params, frozen, batch = world
    alone = jax.tree.map(lambda x: x[:1], batch)
    rule = make_optimizer("adamw", 1e-2)
    metrics, _, _ = kept(objective_of("dpo"), rule, params, frozen, alone)
    changes = metrics[RECORDS][BATCH].changes
    np.testing.assert_allclose(changes.others / changes.own, 0.0, atol=1e-5)


def test_permuted_pairs_have_permuted_entries(world):
    params, frozen, batch = world
    order = np.array([3, 0, 6, 1, 5, 2, 4, 7])
    rule = make_optimizer("adamw", 1e-2, eps=1e-3)
    first, second = (
        kept(objective_of("dpo"), rule, params, frozen, pairs)[0][RECORDS][BATCH].changes
        for pairs in (batch, jax.tree.map(lambda x: x[order], batch))
    )
    for part in PARTS:
        found, expected = getattr(second, part), getattr(first, part)[order]
        np.testing.assert_allclose(found[REAL], expected[REAL], rtol=1e-3, atol=2e-5)


def test_a_held_out_pair_that_is_in_the_batch_has_own_and_others_as_its_others(world):
    params, frozen, batch = world
    rule = make_optimizer("adamw", 1e-2)
    frozen = {**frozen, HELD_OUT: batch}
    metrics, _, _ = kept(objective_of("dpo"), rule, params, frozen, batch)
    watched, held_out = (metrics[RECORDS][name].changes for name in (BATCH, HELD_OUT))
    np.testing.assert_array_equal(held_out.own, 0.0)
    both = watched.own + watched.others
    np.testing.assert_allclose(held_out.others[REAL], both[REAL], rtol=1e-5, atol=1e-6)
    for part in ("optimiser", "curvature"):
        found, expected = getattr(held_out, part), getattr(watched, part)
        np.testing.assert_allclose(found[REAL], expected[REAL], rtol=1e-4, atol=1e-6)
    assert "entanglement/ledger/held_out/others_chosen" in metrics
    assert "entanglement/ledger/held_out/own_chosen" not in metrics


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_are_watched(world, dropout):
    base, _, batch = world
    adapters = init_adapters(base, jax.random.key(3), rank=4, targets=("q", "down"))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    policy = Policy(config=CONFIG, adapter_scale=0.5, adapter_dropout=dropout)
    objective = PreferenceObjective(policy=policy, loss=PREFERENCE_LOSSES["dpo"], options={})
    frozen = {"policy": base, "reference": base}
    rule = make_optimizer("sgd", 0.3, clip_norm=None)
    metrics, before, after = kept(objective, rule, adapters, frozen, batch)
    changes = metrics[RECORDS][BATCH].changes
    np.testing.assert_allclose(changes.optimiser[REAL], 0.0, atol=1e-5)
    if not dropout:
        assert_parts(changes, explicit(objective, frozen, batch, before, after))
        return
    alone = jax.tree.map(lambda x: x[:1], batch)  # the same mask in gradient and ledger
    metrics, _, _ = kept(objective, rule, adapters, frozen, alone)
    changes = metrics[RECORDS][BATCH].changes
    np.testing.assert_allclose(changes.others / changes.own, 0.0, atol=1e-4)


def test_shared_prefixes_change_nothing(world):
    params, frozen, batch = world
    joint = jax.tree.map(jnp.asarray, with_joint_rows(batch))
    rule = make_optimizer("sgd", 0.1, clip_norm=None)
    first, second = (
        kept(objective_of("dpo"), rule, params, frozen, pairs)[0][RECORDS][BATCH].changes
        for pairs in (batch, joint)
    )
    for part in PARTS:
        expected = getattr(first, part)[REAL]
        np.testing.assert_allclose(getattr(second, part)[REAL], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("one_cpu", [False, True], ids=["at once", "one cpu"])
def test_packed_pairs_have_the_same_parts(one_cpu, monkeypatch):
    monkeypatch.setattr(devices, "is_single_cpu", lambda: one_cpu)
    monkeypatch.setattr("jaxalign.models.attention.PACKED_BLOCK", 8)
    packed = jax.tree.map(jnp.asarray, packed_batches()[0])
    params = init_params(PACKED_CONFIG, jax.random.key(1))
    frozen = {"policy": None, "reference": init_params(PACKED_CONFIG, jax.random.key(2))}
    policy = Policy(config=PACKED_CONFIG)
    objective = PreferenceObjective(policy=policy, loss=PREFERENCE_LOSSES["dpo"], options={})
    rule = make_optimizer("sgd", 0.1, clip_norm=None)
    first, second = (
        kept(objective, rule, params, frozen, pairs)[0][RECORDS][BATCH].changes
        for pairs in (packed.apart(), packed)
    )
    real = np.asarray(packed.weight) > 0
    for part in PARTS:
        expected = getattr(first, part)[real]
        np.testing.assert_allclose(getattr(second, part)[real], expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 2, "sequence": 2, "tensor": 2}], ids=str)
def test_on_a_mesh(world, sizes):
    params, frozen, batch = jax.device_get(world)
    frozen = {**frozen, HELD_OUT: batch}
    objective, rule = objective_of("dpo"), make_optimizer("sgd", 0.1, clip_norm=None)
    expected = kept(objective, rule, params, frozen, batch)[0][RECORDS]
    mesh = make_mesh(**sizes)
    state = place(initial_state(params, rule, seed=0), mesh)
    placed = {**frozen, "reference": place(frozen["reference"], mesh)}
    step = partial(
        train_step,
        objective=objective,
        optimizer=rule,
        backward=PairProbe(objective=objective, ledger=True),
    )
    batch = ReferencedBatch(pairs=batch, reference=None)
    _, metrics = compile_step(step, state, mesh)(state, placed, batch)
    for name in (BATCH, HELD_OUT):
        for part in PARTS:
            wanted = np.asarray(getattr(expected[name].changes, part))[REAL]
            found = np.asarray(getattr(metrics[RECORDS][name].changes, part))[REAL]
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=2e-5)
