"""The objective of labelled responses: log-probs, gradients in parts, held-out numbers."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.data.labelled import labelled_batches
from jaxalign.losses import bco_unpaired, kto_unpaired
from jaxalign.models import DecoderConfig
from jaxalign.models.decoder import hidden_states, init_params, unembedding
from jaxalign.models.lora import init_adapters
from jaxalign.sharding import make_mesh, place, shard_batch
from jaxalign.training.labelled import LabelledObjective, evaluate_labelled, separation
from jaxalign.training.objectives import Policy
from jaxalign.training.optimizers import make_optimizer
from jaxalign.training.step import compile_step, gradients, initial_state, train_step
from tests.data.test_labelled import data_of

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=1100,
    width=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_width=8,
    mlp_width=24,
    context_length=64,
    tied=True,
)
LENGTH = 64


@pytest.fixture(scope="module")
def weights():
    """Policy and reference: two random models."""
    return tuple(init_params(CONFIG, jax.random.key(seed)) for seed in (0, 1))


def objective_of(loss, **options):
    return LabelledObjective(policy=Policy(config=CONFIG), loss=loss, options=options, coupled=True)


def batch_of(rng, number=8, mismatched="batch"):
    data = data_of(rng, number)
    how = {"max_length": LENGTH, "mismatched": mismatched, "batch_size": number}
    batch = next(labelled_batches(data, shuffle=False, epochs=1, **how))
    return data, jax.tree.map(jnp.asarray, batch)


def dense_sums(params, rows):
    """Log-probs of responses, from whole arrays of logits."""
    hidden = hidden_states(params, CONFIG, jnp.asarray(rows.tokens[:, 0]))
    logits = jnp.matmul(hidden, unembedding(params, CONFIG)[0], precision="highest")
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    sums = []
    for row, (tokens, begin, size) in enumerate(
        zip(rows.tokens[:, 0], rows.prompt_length[:, 0], rows.response_length[:, 0], strict=True)
    ):
        places = np.arange(int(begin), int(begin + size))
        sums.append(log_probs[row, places - 1, np.asarray(tokens)[places]].sum())
    return np.array(sums)


def test_outputs_are_those_of_dense_logits(rng, weights):
    policy, reference = weights
    _, batch = batch_of(rng)
    frozen = {"policy": None, "reference": reference}
    out = objective_of(kto_unpaired).forward(policy, frozen, batch, None)
    np.testing.assert_allclose(out.log_prob, dense_sums(policy, batch.responses), rtol=1e-5)
    np.testing.assert_allclose(out.reference, dense_sums(reference, batch.responses), rtol=1e-5)
    other = dense_sums(policy, batch.mismatched) - dense_sums(reference, batch.mismatched)
    np.testing.assert_allclose(out.mismatched_log_ratio, other, rtol=1e-3, atol=2e-3)
    assert jnp.isnan(
        objective_of(bco_unpaired).forward(policy, frozen, batch, None).mismatched_log_ratio
    ).all()


@pytest.mark.parametrize("loss", [kto_unpaired, bco_unpaired])
@pytest.mark.parametrize("adapted", [False, True])
def test_parts_and_devices_change_nothing(rng, weights, loss, adapted):
    policy, reference = weights
    _, batch = batch_of(rng)
    objective = objective_of(loss, beta=0.3)
    frozen = {"policy": None, "reference": reference}
    trained = policy
    if adapted:
        objective = dataclasses.replace(objective, policy=Policy(config=CONFIG, adapter_scale=2.0))
        trained = init_adapters(policy, jax.random.key(2), rank=2, targets=("q", "v"))
        trained = jax.tree.map(lambda x: x + 0.01, trained)
        frozen = {"policy": policy, "reference": policy}
    start = {name: jnp.float32(x) for name, x in objective.statistics.start.items()}

    def of(parts):
        return gradients(
            objective, trained, frozen, batch, jax.random.key(0), micro_batches=parts, running=start
        )

    whole, metrics, _ = of(1)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(whole))
    assert scale > 0
    for parts in (2, 8):
        grads, others, _ = of(parts)
        for one, two in zip(jax.tree.leaves(grads), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(one, two, atol=2e-5 * scale)
        for name, mean in metrics.items():
            np.testing.assert_allclose(others[name].total, mean.total, rtol=2e-4, atol=1e-4)
    mesh = make_mesh(data=4, fsdp=2)
    optimizer = make_optimizer("adamw", 1e-3)
    step = compile_step(
        lambda *inputs: train_step(*inputs, objective=objective, optimizer=optimizer),
        state := place(
            initial_state(trained, optimizer, seed=0, running=objective.statistics.start), mesh
        ),
        mesh,
    )
    placed = jax.tree.map(lambda x: place(x, mesh), frozen)
    _, sharded = step(state, placed, shard_batch(batch, mesh))
    np.testing.assert_allclose(sharded["loss"].value(), metrics["loss"].value(), rtol=1e-5)


def test_the_gradient_of_kto_does_not_flow_through_the_zero_point(rng, weights):
    policy, reference = weights
    _, batch = batch_of(rng)
    frozen = {"policy": None, "reference": reference}
    objective = objective_of(kto_unpaired, beta=0.3)
    grads, metrics, _ = gradients(objective, policy, frozen, batch, jax.random.key(0))
    zero = metrics["statistics/kl"].total
    fixed = objective_of(lambda responses, **more: kto_unpaired(responses, kl=zero, beta=0.3))
    direct, _, _ = gradients(fixed, policy, frozen, batch, jax.random.key(0))
    for one, two in zip(jax.tree.leaves(grads), jax.tree.leaves(direct), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_held_out_numbers_do_not_depend_on_the_batches(rng, weights):
    policy, reference = weights
    data, frozen = data_of(rng, 21), {"policy": None, "reference": reference}
    mesh = make_mesh(devices=jax.devices()[:1])
    objective = objective_of(kto_unpaired, beta=0.05)
    optimizer = make_optimizer("adamw", 1e-3)
    state = initial_state(policy, optimizer, seed=0)
    found = []
    for size in (4, 7, 21):
        once = {"epochs": 1, "shuffle": False, "window": 16, "batch_size": size}
        batches = labelled_batches(data, max_length=LENGTH, mismatched="all", **once)
        found.append(evaluate_labelled(objective, list(batches), mesh)(state, frozen))
    assert {"rewards/auc", "rewards/accuracies", "calibration/error", "loss"} <= set(found[0])
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, value in other.items():
            assert value == pytest.approx(found[0][name], rel=1e-4, abs=1e-5), name


def test_a_policy_that_is_its_reference_separates_nothing(rng, weights):
    policy, frozen = weights[0], {"policy": None, "reference": weights[0]}
    once = {"epochs": 1, "shuffle": False, "window": 16, "batch_size": 8}
    batches = labelled_batches(data_of(rng, 16), max_length=LENGTH, mismatched="all", **once)
    mesh, optimizer = make_mesh(devices=jax.devices()[:1]), make_optimizer("adamw", 1e-3)
    state = initial_state(policy, optimizer, seed=0)
    found = evaluate_labelled(objective_of(kto_unpaired), list(batches), mesh)(state, frozen)
    assert found["rewards/auc"] == found["rewards/accuracies"] == 0.5
    assert found["loss"] == pytest.approx(0.5, abs=1e-5)


def test_separation_counts_pairs_of_labels(rng):
    rewards = np.round(rng.normal(size=40), 1)  # with ties
    desirable = rng.random(40) < 0.4
    wins = [
        1.0 if good > bad else 0.5 if good == bad else 0.0
        for good, bad in itertools.product(rewards[desirable], rewards[~desirable])
    ]
    found = separation(rewards, desirable)
    assert found["rewards/auc"] == pytest.approx(np.mean(wins))
    right = np.where(rewards == 0, 0.5, (rewards > 0) == desirable)
    assert found["rewards/accuracies"] == pytest.approx(right.mean())
    assert "rewards/auc" not in separation(rewards, np.ones(40, bool))
