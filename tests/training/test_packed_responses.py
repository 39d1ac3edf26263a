"""Packed responses, labelled responses and scored pairs have the numbers of padded ones."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.data import TokenizedResponses
from jaxalign.data.labelled import LabelledRows, labelled_batches
from jaxalign.data.packing import Packing, packed_batches
from jaxalign.losses import bco_unpaired, kto_unpaired
from jaxalign.models import devices
from jaxalign.models.lora import init_adapters
from jaxalign.models.score import SCORE, init_head, with_head
from jaxalign.sharding import make_mesh, place, shard_batch
from jaxalign.training.evaluation import evaluate_losses, evaluate_scores
from jaxalign.training.labelled import LabelledObjective, evaluate_labelled
from jaxalign.training.objectives import Policy, SupervisedObjective
from jaxalign.training.reward_objectives import VALUES, ScoreObjective
from jaxalign.training.step import compile_step, gradients, initial_state, train_step
from tests.data.test_packing import make_alike
from tests.training.test_packed_pairs import CONFIG, close, on_device, world

PAIRS = make_alike(21, longest=14)
RESPONSES = TokenizedResponses(rows=dataclasses.replace(PAIRS.rows, record_index=np.arange(42)))
LABELLED = LabelledRows(
    rows=RESPONSES.rows, desirable=np.random.default_rng(0).random(len(RESPONSES)) < 0.4
)


def batches_of(name, size=8, *, micro_batches=1, shards=1, whose="batch", **order):
    packing = Packing(shards=shards, micro_batches=micro_batches)
    order = {"epochs": 1, "batch_size": size} | order
    if name == "sft":
        return list(packed_batches(RESPONSES, packing, **order))
    if name in VALUES:
        return list(packed_batches(PAIRS, packing, **order))
    mismatched = whose if name == "kto_unpaired" else "none"
    how = {"max_length": 24, "mismatched": mismatched, "packing": packing}  # some prompts are cut
    return list(labelled_batches(LABELLED, **how, **order))


def apart(batch):
    """The same batch without its packed rows, of which it has some."""
    if hasattr(batch, "responses"):
        parts = {"responses": batch.responses, "mismatched": batch.mismatched}
        parts = {name: part if part is None else apart(part) for name, part in parts.items()}
        return dataclasses.replace(batch, **parts)
    assert batch.packed is not None
    return batch.apart()


def objective_of(name, policy):
    if name == "sft":
        return SupervisedObjective(policy=policy)
    if name in VALUES:
        return ScoreObjective(policy=policy, values=VALUES[name], options={})
    loss = {"kto_unpaired": kto_unpaired, "bco_unpaired": bco_unpaired}[name]
    return LabelledObjective(policy=policy, loss=loss, options={"beta": 0.3}, coupled=True)


def parameters_of(name):
    params, frozen = world()
    if name not in VALUES:
        return params, frozen
    return with_head(params, init_head(CONFIG.width, jax.random.key(3))), frozen


def both(run, batch):
    return (run(on_device(x)) for x in (batch, apart(batch)))


@pytest.mark.parametrize(
    ("name", "micro_batches", "one_cpu"),
    [
        ("sft", 1, True),
        ("sft", 2, False),
        ("kto_unpaired", 2, True),
        ("bco_unpaired", 1, False),
        ("bradley_terry", 2, True),
    ],
)
def test_losses_gradients_and_metrics(name, micro_batches, one_cpu, monkeypatch):
    """All batches of an epoch, the filled last one, too."""
    monkeypatch.setattr(devices, "is_single_cpu", lambda: one_cpu)
    monkeypatch.setattr("jaxalign.models.attention.PACKED_BLOCK", 8)
    params, frozen = parameters_of(name)
    objective = objective_of(name, Policy(config=CONFIG, remat="dots"))
    start = getattr(objective, "statistics", None)
    running = {k: jnp.float32(v) for k, v in start.start.items()} if start else None

    @jax.jit
    def run(batch):
        how = {"micro_batches": micro_batches, "running": running}
        return gradients(objective, params, frozen, batch, jax.random.key(0), **how)[:2]

    batches = batches_of(name, micro_batches=micro_batches)
    assert any((getattr(x, "responses", x).weight == 0).any() for x in batches)
    for batch in batches:
        packed, plain = both(run, batch)
        close(packed[0], plain[0], rtol=1e-5, atol=1e-5)
        values = ({k: m.value() for k, m in x[1].items()} for x in (packed, plain))
        close(*values, rtol=1e-5, atol=1e-5)
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(plain[0])) > 1e-3


@pytest.mark.parametrize("name", ["sft", "bradley_terry"])
def test_adapters(name):
    params, _ = parameters_of(name)
    adapters = init_adapters(params, jax.random.key(2), rank=2, targets=["q", "down"])
    trained = jax.tree.map(lambda x: x + 0.2, adapters)
    if name in VALUES:
        trained |= {SCORE: params[SCORE]}
    frozen = {"policy": params, "reference": params}
    objective = objective_of(name, Policy(config=CONFIG, adapter_scale=0.5))
    run = jax.jit(lambda x: gradients(objective, trained, frozen, x, jax.random.key(0))[0])
    close(*both(run, batches_of(name)[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shards", "micro_batches"),
    [("sft", 8, 1), ("kto_unpaired", 2, 2), ("bradley_terry", 2, 2)],
)
def test_devices_share_packed_rows(name, shards, micro_batches):
    """The update of one device with padded rows."""
    params, frozen = parameters_of(name)
    objective = objective_of(name, Policy(config=CONFIG))
    batch = batches_of(name, 16, shards=shards, micro_batches=micro_batches)[0]
    optimizer = optax.sgd(0.1)
    step = partial(
        train_step, objective=objective, optimizer=optimizer, micro_batches=micro_batches
    )
    state = initial_state(params, optimizer, seed=0)
    expected, metrics = jax.jit(step)(state, frozen, on_device(apart(batch)))
    mesh = make_mesh(devices=jax.devices()[:shards])
    state, reference = place(state, mesh), place(frozen["reference"], mesh)
    frozen = {"policy": None, "reference": reference}
    found, more = compile_step(step, state, mesh)(state, frozen, shard_batch(batch, mesh))
    close(found.params, expected.params, atol=1e-6)
    assert more["loss"].value() == pytest.approx(float(metrics["loss"].value()), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "shards"), [("sft", 4), ("kto_unpaired", 1), ("bradley_terry", 4)]
)
def test_held_out_metrics(name, shards):
    params, frozen = parameters_of(name)
    objective, mesh = (
        objective_of(name, Policy(config=CONFIG)),
        make_mesh(devices=jax.devices()[:shards]),
    )
    evaluate = {"sft": evaluate_losses, "kto_unpaired": evaluate_labelled}
    evaluate = evaluate.get(name, evaluate_scores)
    state = place(initial_state(params, optax.sgd(0.1), seed=0), mesh)
    frozen = {"policy": None, "reference": place(frozen["reference"], mesh)}
    packed = batches_of(name, shards=shards, whose="all", shuffle=False, window=16)
    plain = [apart(batch) for batch in packed]
    found, expected = (evaluate(objective, x, mesh)(state, frozen) for x in (packed, plain))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_response_whose_row_is_elsewhere_is_not_a_number():
    """Micro-batches that do not fit the rows must not give wrong numbers."""
    params, frozen = parameters_of("bradley_terry")
    batch = on_device(batches_of("bradley_terry", micro_batches=2)[0])
    lost = dataclasses.replace(batch.packed, row_number=batch.packed.row_number + 1)
    objective = objective_of("bradley_terry", Policy(config=CONFIG))
    lost = dataclasses.replace(batch, packed=lost)
    scores = objective.forward(params, frozen, lost, None)
    np.testing.assert_array_equal(np.isnan(scores).all(1), np.asarray(batch.packed.row) == 0)
