"""Packed pairs have the numbers of padded pairs: log-probs, losses, gradients, metrics."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.data import packing as rows
from jaxalign.data import pair_batches
from jaxalign.data.packing import Packing
from jaxalign.entanglement.masks import initial_head
from jaxalign.entanglement.reweighting import normalised
from jaxalign.losses import PREFERENCE_LOSSES, TOKEN_LOSSES
from jaxalign.models import devices, logprobs, probes
from jaxalign.models.compute import Compute
from jaxalign.models.decoder import init_params, logits
from jaxalign.models.lora import init_adapters
from jaxalign.models.responses import (
    compare_responses,
    pair_spans,
    response_log_probs,
    response_states,
)
from jaxalign.sharding import make_mesh, place, shard_batch
from jaxalign.training.evaluation import evaluate_preferences
from jaxalign.training.masking import HEAD, MaskedPreferenceObjective
from jaxalign.training.objectives import (
    Policy,
    PreferenceObjective,
    ReferencedBatch,
    TokenPreferenceObjective,
)
from jaxalign.training.pair_probe import PairProbe
from jaxalign.training.reference import precompute_reference
from jaxalign.training.step import compile_step, gradients, initial_state, train_step
from tests.data.test_packing import make_alike
from tests.data.test_turns import masked
from tests.models.test_shared_prefix import KINDS
from tests.slow import mostly_slow, slow

WORDS = 99
MODELS = {
    name: dataclasses.replace(config, vocab_size=WORDS, context_length=64)
    for name, config in KINDS.items()
}
CONFIG = MODELS["plain"]
PAIRS = make_alike(21, longest=14)


@pytest.fixture(params=[False, True], ids=["at once", "one cpu"])
def one_cpu(request, monkeypatch):
    """Both ways through attention, the second in blocks of few queries."""
    monkeypatch.setattr(devices, "is_single_cpu", lambda: request.param)
    monkeypatch.setattr("jaxalign.models.attention.PACKED_BLOCK", 8)
    return request.param


def packed_batches(batch_size=8, pairs=PAIRS, micro_batches=1, shards=1, with_apart=False, **order):
    packing = Packing(shards=shards, micro_batches=micro_batches, apart=with_apart)
    order = {"epochs": 1} | order
    batches = list(rows.packed_batches(pairs, packing, batch_size=batch_size, **order))
    assert all(batch.packed is not None for batch in batches)
    return batches


def on_device(batch):
    return jax.tree.map(jnp.asarray, batch)


def referenced(batch):
    return ReferencedBatch(pairs=on_device(batch), reference=None)


def apart(batch):
    return dataclasses.replace(batch, pairs=batch.pairs.apart())


def padded(batch):
    return dataclasses.replace(
        batch, pairs=dataclasses.replace(batch.pairs, packed_apart=None).apart()
    )


def close(found, expected, rtol=1e-5, atol=2e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected
    )


def world(config=CONFIG):
    params, reference = (init_params(config, jax.random.key(seed)) for seed in (1, 2))
    return params, {"policy": None, "reference": reference}


@pytest.mark.parametrize(
    ("name", "one_cpu"),
    mostly_slow(
        itertools.product(MODELS, [False, True]),
        quick=[
            ("plain", False),
            ("learned positions", True),
            ("window", False),
            ("some windows", True),
            ("some windows", False),
            ("some rotated", True),
        ],
    ),
    indirect=["one_cpu"],
)
def test_every_token_has_its_log_prob_entropy_and_gradient(name, one_cpu, rng):
    """All batches of an epoch: filler, equal prompts, none in common, one row within the other."""
    config = MODELS[name]
    params, _ = world(config)

    def loss(params, rows, weights):
        out = response_log_probs(params, config, rows, compute=Compute(remat="dots"))
        return jnp.sum(weights * out.log_prob), out

    run = jax.jit(jax.grad(loss, has_aux=True))
    for batch in map(on_device, packed_batches()):
        weights = jnp.asarray(rng.normal(size=(16, batch.response_tokens.shape[-1])))
        slopes, out = run(params, batch.rows(shared_prefix=True), weights)
        expected_slopes, expected = run(params, batch.rows(), weights)
        close(out, expected)
        close(slopes, expected_slopes, atol=1e-5)
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(slopes)) > 0.1


def test_tokens_of_turns_of_others_are_read_and_not_scored():
    """Padded, joint and packed rows have the log-probs that whole rows have there."""
    params, _ = world()
    pairs = masked(PAIRS)

    def loss(params, rows, weights):
        out = response_log_probs(params, CONFIG, rows)
        return jnp.sum(weights * out.log_prob), out

    @jax.jit
    def whole(params, tokens):
        return jax.nn.log_softmax(logits(params, CONFIG, tokens), axis=-1)

    run = jax.jit(jax.grad(loss, has_aux=True))
    joint = pair_batches(pairs, batch_size=8, epochs=1, joint_share=1.0, buckets=1)
    packed = packed_batches(pairs=pairs)
    assert {batch.joint_tokens is None for batch in packed} == {True}
    for batch in map(on_device, [next(joint), packed[0]]):
        assert batch.scored_positions is not None
        size = batch.response_tokens.shape[-1]
        real = jnp.arange(size)[None] < batch.response_length.reshape(-1, 1)
        weights = jnp.where(real, jnp.arange(16.0)[:, None] - 7.5, 0.0)
        slopes, out = run(params, batch.rows(shared_prefix=True), weights)
        expected_slopes, expected = run(params, batch.rows(), weights)
        close(out, expected)
        close(slopes, expected_slopes, atol=1e-5)
        tokens = batch.tokens.reshape(16, -1)
        at, scored = (x.reshape(16, size) for x in (batch.scored_positions, batch.response_tokens))
        found = whole(params, tokens)[jnp.arange(16)[:, None], at, scored]
        close(out.log_prob, jnp.where(real, found, 0.0), atol=1e-5)


@pytest.mark.parametrize("seed", mostly_slow(range(3), quick=[2]))
def test_random_pairs_in_batches_of_any_size(seed, one_cpu):
    """Down to one pair of one-token responses, up to rows of the largest length."""
    rng = np.random.default_rng(seed)
    params, _ = world()
    pairs = make_alike(int(rng.integers(1, 12)), seed=seed, longest=[2, 12, 31][seed])
    run = jax.jit(lambda rows: response_log_probs(params, CONFIG, rows))
    for size in (1, 3, 12):
        batch = on_device(packed_batches(size, pairs, seed=seed)[0])
        close(run(batch.rows(shared_prefix=True)), run(batch.rows()))


def test_the_states_and_the_divergence_of_every_token(one_cpu):
    params, frozen = world()
    batch = on_device(packed_batches()[0])
    rows = batch.rows(), batch.rows(shared_prefix=True)
    lengths = np.asarray(batch.response_length).reshape(-1, 1)
    real = np.arange(batch.response_tokens.shape[-1])[None] < lengths
    states = jax.jit(lambda rows: response_states(params, CONFIG, rows))
    plain, packed = (states(x)[real] for x in rows)
    close(packed, plain)
    reference = frozen["reference"]
    both = jax.jit(lambda rows: compare_responses(params, reference, CONFIG, rows, reverse=True))
    plain, packed = map(both, rows)
    assert float(plain.kl.max()) > 1e-3
    close(packed, plain)


def objectives():
    policy = Policy(config=CONFIG)
    for name in ("dpo", "kto"):  # each pair by itself, and with statistics of the batch
        loss, coupled = PREFERENCE_LOSSES[name], name == "kto"
        yield name, PreferenceObjective(policy=policy, loss=loss, options={}, coupled=coupled)
    dpo = {"loss": PREFERENCE_LOSSES["dpo"], "options": {}}
    yield "masked", MaskedPreferenceObjective(policy=policy, **dpo, penalty=0.1)
    loss = TOKEN_LOSSES["tdpo2"]
    yield "tdpo2", TokenPreferenceObjective(policy=policy, loss=loss, options={})


@pytest.mark.parametrize(
    ("name", "micro_batches"),
    [slow(("dpo", 1)), ("dpo", 2), ("kto", 2), ("masked", 1), ("tdpo2", 1)],
)
def test_losses_gradients_and_metrics(name, micro_batches):
    params, frozen = world()
    objective = dict(objectives())[name]
    if name == "masked":
        params |= {HEAD: jax.tree.map(lambda x: x + 0.1, initial_head(CONFIG.width, WORDS))}
    run = jax.jit(partial(gradients, objective, micro_batches=micro_batches))
    for batch in map(referenced, packed_batches(micro_batches=micro_batches)):
        packed, plain = (
            run(params, frozen, x, jax.random.key(0))[:2] for x in (batch, apart(batch))
        )
        close(packed[0], plain[0], rtol=1e-5, atol=1e-5)
        values = ({k: m.value() for k, m in x[1].items()} for x in (packed, plain))
        close(*values, rtol=1e-5, atol=1e-5)


def test_adapters_of_packed_pairs():
    params, _ = world()
    adapters = init_adapters(params, jax.random.key(2), rank=2, targets=["q", "down"])
    adapters = jax.tree.map(lambda x: x + 0.2, adapters)
    policy = Policy(config=CONFIG, adapter_scale=0.5)
    objective = PreferenceObjective(policy=policy, loss=PREFERENCE_LOSSES["dpo"], options={})
    frozen = {"policy": params, "reference": params}
    batch = referenced(packed_batches()[0])
    run = jax.jit(partial(gradients, objective))
    packed, plain = (run(adapters, frozen, x, jax.random.key(0))[0] for x in (batch, apart(batch)))
    close(packed, plain, rtol=1e-4, atol=1e-5)


def dpo():
    policy = Policy(config=CONFIG)
    return PreferenceObjective(policy=policy, loss=PREFERENCE_LOSSES["dpo"], options={})


@pytest.mark.parametrize(("shards", "micro_batches"), [slow((8, 1)), (2, 2)])
def test_devices_share_packed_rows(shards, micro_batches):
    """The update of one device with padded rows."""
    params, frozen = world()
    optimizer, batch = (
        optax.sgd(0.1),
        packed_batches(16, shards=shards, micro_batches=micro_batches),
    )
    step = partial(train_step, objective=dpo(), optimizer=optimizer, micro_batches=micro_batches)
    state = initial_state(params, optimizer, seed=0)
    expected, metrics = jax.jit(step)(state, frozen, apart(referenced(batch[0])))
    mesh = make_mesh(devices=jax.devices()[:shards])
    state, frozen = place(state, mesh), place(frozen["reference"], mesh)
    packed = shard_batch(ReferencedBatch(pairs=batch[0], reference=None), mesh)
    found, more = compile_step(step, state, mesh)(
        state, {"policy": None, "reference": frozen}, packed
    )
    close(found.params, expected.params, atol=1e-6)
    assert more["loss"].value() == pytest.approx(float(metrics["loss"].value()), rel=1e-5)


def test_a_pair_whose_row_is_elsewhere_is_not_a_number():
    """Micro-batches that do not fit the rows must not give wrong numbers."""
    params, _ = world()
    batch = on_device(packed_batches(micro_batches=2)[0])
    lost = dataclasses.replace(batch.packed, row_number=batch.packed.row_number + 1)
    rows = dataclasses.replace(batch.rows(), packed=lost)
    out = response_log_probs(params, CONFIG, rows).log_prob.sum(1)
    in_first = np.repeat(np.asarray(batch.packed.row) == 0, 2)
    assert np.isnan(out[in_first]).all()
    assert in_first.sum() == 8


def same_statistics(found, expected, real):
    """Of the pairs with weight: squared norms, inner products relative to these, all the others."""

    def compare(found, expected):
        found, expected = (jax.tree.map(lambda x: x[real], x) for x in (found, expected))
        scale = jnp.sqrt(expected.chosen * expected.rejected)
        np.testing.assert_allclose(found.chosen, expected.chosen, rtol=1e-5)
        np.testing.assert_allclose(found.rejected, expected.rejected, rtol=1e-5)
        np.testing.assert_allclose(found.inner / scale, expected.inner / scale, atol=1e-5)

    compare(found.geometry, expected.geometry)
    assert found.parts.keys() == expected.parts.keys()
    floor = 1e-9  # a part may have no gradient
    for name, part in found.parts.items():
        compare(*(jax.tree.map(lambda x: x + floor, x) for x in (part, expected.parts[name])))
    others = ((x.weights, x.log_probs) for x in (found, expected))
    close(*(jax.tree.map(lambda x: x[real], x) for x in others), atol=1e-6)


def probed(objective, trained, frozen, batch, **options):
    """The gradient and the statistics."""
    probe = PairProbe(objective=objective, parts=True, **options.pop("probe", {}))
    run = jax.jit(partial(gradients, objective, backward=probe, **options))
    grads, _, seen = run(trained, frozen, batch, jax.random.key(0))
    return grads, seen


@pytest.mark.parametrize(
    ("name", "formed", "one_by_one"),
    [
        slow(("plain", True, True)),
        ("plain", True, False),
        ("plain", False, True),
        slow(("plain", False, False)),
        ("learned positions", True, True),
        slow(("window", True, True)),
    ],
)
def test_a_probe_sees_the_gradients_of_packed_pairs(name, formed, one_by_one, monkeypatch):
    """As of padded rows, whose statistics are tested against two passes for every pair."""
    for module in (probes, logprobs):
        monkeypatch.setattr(module, "forms_gradients", lambda *_: formed)
    monkeypatch.setattr(devices, "is_single_cpu", lambda: one_by_one)
    params, frozen = world(MODELS[name])
    objective = dataclasses.replace(dpo(), policy=Policy(config=MODELS[name]))
    batch = referenced(packed_batches(with_apart=True)[-1])
    assert batch.pairs.packed_apart is not None
    assert (np.asarray(batch.pairs.weight) == 0).any()  # filler
    (grads, seen), (plain, expected) = (
        probed(objective, params, frozen, x) for x in (batch, padded(batch))
    )
    close(grads, plain, atol=1e-5)
    same_statistics(seen, expected, np.asarray(batch.pairs.weight) > 0)


@pytest.mark.parametrize(
    ("name", "micro_batches"),
    [slow(("kto", 2)), ("masked", 1), slow(("reweighted", 1)), ("reweighted", 2)],
)
def test_probes_of_packed_pairs_under_every_objective(name, micro_batches):
    params, frozen = world()
    objective = dict(objectives())["dpo" if name == "reweighted" else name]
    if name == "masked":
        params |= {HEAD: jax.tree.map(lambda x: x + 0.1, initial_head(CONFIG.width, WORDS))}
    options = {"micro_batches": micro_batches}
    if name == "reweighted":
        options["probe"] = {"reweighting": normalised}
    batch = referenced(packed_batches(micro_batches=micro_batches, with_apart=True)[-1])
    (grads, seen), (plain, expected) = (
        probed(objective, params, frozen, x, **dict(options)) for x in (batch, padded(batch))
    )
    close(grads, plain, atol=1e-5)
    same_statistics(seen, expected, np.asarray(batch.pairs.weight) > 0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_probes_of_adapters_of_packed_pairs(dropout):
    params, _ = world()
    adapters = init_adapters(params, jax.random.key(2), rank=2, targets=["q", "down"])
    adapters = jax.tree.map(lambda x: x + 0.2, adapters)
    policy = Policy(config=CONFIG, adapter_scale=0.5, adapter_dropout=dropout)
    objective = PreferenceObjective(policy=policy, loss=PREFERENCE_LOSSES["dpo"], options={})
    frozen = {"policy": params, "reference": params}
    batch = referenced(packed_batches(with_apart=True)[0])
    grads, seen = probed(objective, adapters, frozen, batch)
    if dropout:  # whose draws depend on the rows: the plain step on these rows has them, too
        plain = dataclasses.replace(batch, pairs=batch.pairs.apart())
        run = jax.jit(partial(gradients, objective))
        close(grads, run(adapters, frozen, plain, jax.random.key(0))[0], rtol=1e-4, atol=1e-5)
        return
    plain, expected = probed(objective, adapters, frozen, padded(batch))
    close(grads, plain, rtol=1e-4, atol=1e-5)
    same_statistics(seen, expected, np.asarray(batch.pairs.weight) > 0)


@pytest.mark.parametrize(("shards", "micro_batches"), [slow((4, 1)), (2, 2)])
def test_devices_share_the_packed_rows_of_a_probed_step(shards, micro_batches):
    """Update and metrics of one device with padded rows."""
    params, frozen = world()
    optimizer, objective = optax.sgd(0.1), dpo()
    batch = packed_batches(16, shards=shards, micro_batches=micro_batches, with_apart=True)[0]
    assert batch.packed_apart.tokens.shape[0] == shards * micro_batches
    step = partial(
        train_step,
        objective=objective,
        optimizer=optimizer,
        micro_batches=micro_batches,
        backward=PairProbe(objective=objective, parts=True, realised=True),
    )
    state = initial_state(params, optimizer, seed=0)
    expected, metrics = jax.jit(step)(state, frozen, padded(referenced(batch)))
    mesh = make_mesh(devices=jax.devices()[:shards])
    state, frozen = place(state, mesh), place(frozen["reference"], mesh)
    packed = shard_batch(ReferencedBatch(pairs=batch, reference=None), mesh)
    found, more = compile_step(step, state, mesh)(
        state, {"policy": None, "reference": frozen}, packed
    )
    close(found.params, expected.params, atol=1e-6)
    for name, mean in metrics.items():
        if name.startswith("entanglement"):
            wanted, rtol = float(mean.value()), 1e-3 if "realised" in name else 2e-5
            assert more[name].value() == pytest.approx(wanted, rel=rtol, abs=2e-5), name


def test_rows_that_share_prefixes_are_not_probed():
    batch = on_device(packed_batches()[0])
    with pytest.raises(ValueError, match="pack them apart"):
        pair_spans(batch.rows(shared_prefix=True), batch.weight)


@pytest.mark.parametrize("shards", [1, 4])
def test_held_out_metrics_and_stored_log_probs(shards, tmp_path):
    params, frozen = world()
    mesh = make_mesh(devices=jax.devices()[:shards])
    state = place(initial_state(params, optax.sgd(0.1), seed=0), mesh)
    frozen = {"policy": None, "reference": place(frozen["reference"], mesh)}
    once = {"shuffle": False, "window": 16}
    packed = packed_batches(8, shards=shards, **once)
    plain = [batch.apart() for batch in packed]
    found, expected = (evaluate_preferences(dpo(), x, mesh)(state, frozen) for x in (packed, plain))
    assert expected["kl"] > 1e-3
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    tables = [
        precompute_reference(
            dpo(),
            frozen["reference"],
            batches,
            partial(shard_batch, mesh=mesh),
            tmp_path / f"{name}.npz",
            mesh,
            "",
            records=PAIRS.record_index,
        )
        for name, batches in (("packed", packed), ("plain", plain))
    ]
    assert len(tables[0]) == len(PAIRS)
    np.testing.assert_allclose(tables[0], tables[1], rtol=1e-5)
