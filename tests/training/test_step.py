"""The step: accumulation, devices, dropout of non-finite updates, against plain formulas."""

import dataclasses
import itertools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.data.batches import PairBatch
from jaxalign.losses import BATCH_COUPLED, PREFERENCE_LOSSES, TOKEN_LOSSES
from jaxalign.models import Decoder, DecoderConfig
from jaxalign.models.decoder import init_params
from jaxalign.sharding import make_mesh, place
from jaxalign.training.evaluation import evaluate_preferences
from jaxalign.training.objectives import (
    Policy,
    PreferenceObjective,
    ReferencedBatch,
    SupervisedObjective,
    TokenPreferenceObjective,
)
from jaxalign.training.step import compile_step, gradients, initial_state, train_step
from tests.slow import mostly_slow

CONFIG = DecoderConfig(
    vocab_size=29,
    width=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_width=8,
    mlp_width=24,
    context_length=32,
)
PAIRS, LENGTH, RESPONSE = 8, 12, 6
EXCHANGE = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute)(-start)?\(")


def make_batch(rng, pairs=PAIRS):
    prompt = np.repeat(rng.integers(2, LENGTH - RESPONSE, size=(pairs, 1)), 2, axis=1)
    response = rng.integers(1, RESPONSE + 1, size=(pairs, 2))
    tokens = np.zeros((pairs, 2, LENGTH), np.int32)
    responses = np.zeros((pairs, 2, RESPONSE), np.int32)
    for i in range(pairs):
        shared = rng.integers(1, 29, size=prompt[i, 0])
        for side in range(2):
            p, r = prompt[i, side], response[i, side]
            responses[i, side, :r] = rng.integers(1, 29, size=r)
            tokens[i, side, :p] = shared
            tokens[i, side, p : p + r] = responses[i, side, :r]
    return PairBatch(
        tokens=tokens,
        prompt_length=prompt.astype(np.int32),
        response_tokens=responses,
        response_length=response.astype(np.int32),
        record_index=np.arange(pairs, dtype=np.int32),
        weight=np.r_[np.ones(pairs - 1), 0.0].astype(np.float32),
    )


def with_joint_rows(batch):
    """The pairs' rows also two in one."""
    joint = np.zeros((PAIRS, LENGTH + RESPONSE), np.int32)
    tokens = np.asarray(batch.tokens)
    lengths = np.asarray(batch.prompt_length + batch.response_length)
    common = np.zeros(PAIRS, np.int32)
    for pair in range(PAIRS):
        chosen, rejected = (tokens[pair, side, : lengths[pair, side]] for side in (0, 1))
        size = min(len(chosen), len(rejected))
        common[pair] = np.cumprod(chosen[:size] == rejected[:size]).sum()
        row = np.concatenate([chosen, rejected[common[pair] :]])
        joint[pair, : len(row)] = row
    return dataclasses.replace(batch, joint_tokens=joint, common_length=common)


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    params = init_params(CONFIG, jax.random.key(1))
    reference = init_params(CONFIG, jax.random.key(2))
    batch = jax.tree.map(jnp.asarray, make_batch(rng))
    frozen = {"policy": None, "reference": reference}
    return params, frozen, ReferencedBatch(pairs=batch, reference=None)


def objective_of(name, **options):
    return PreferenceObjective(
        policy=Policy(config=CONFIG),
        loss=PREFERENCE_LOSSES[name],
        options=options,
        coupled=name in BATCH_COUPLED,
    )


def test_a_sharded_step_moves_parameters_and_not_the_rows_states(world):
    """With parameters split, no device sees all rows: what devices exchange is never that large."""
    params, frozen, batch = jax.device_get(world)
    mesh, optimizer = make_mesh(fsdp=8), optax.sgd(1e-3)
    state = place(initial_state(params, optimizer, seed=0), mesh)
    frozen = {"policy": None, "reference": place(frozen["reference"], mesh)}
    step = partial(train_step, objective=objective_of("dpo"), optimizer=optimizer)
    text = compile_step(step, state, mesh).lower(state, frozen, batch).compile().as_text()
    exchanged = [EXCHANGE.split(x)[0] for x in text.splitlines() if EXCHANGE.search(x)]
    assert len(exchanged) > 5
    everything = re.compile(rf"f32\[({2 * PAIRS},{LENGTH}|{2 * PAIRS * LENGTH}),")
    assert [shapes for shapes in exchanged if everything.search(shapes)] == []


def assert_trees_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def dense_log_probs(params, batch):
    """Summed response log-probs by the plain way: all logits, log-softmax, pick, mask."""
    rows = batch.tokens.reshape(-1, LENGTH)
    logps = jax.nn.log_softmax(Decoder(CONFIG, params)(rows))[:, :-1]
    picked = jnp.take_along_axis(logps, rows[:, 1:, None], axis=-1)[..., 0]
    start = batch.prompt_length.reshape(-1, 1)
    stop = start + batch.response_length.reshape(-1, 1)
    position = jnp.arange(1, LENGTH)[None]
    scored = (position >= start) & (position < stop)
    return jnp.where(scored, picked, 0).sum(-1).reshape(-1, 2)


def test_log_probs_are_those_of_the_full_logits(world):
    params, frozen, batch = world
    outputs = objective_of("dpo").forward(params, frozen, batch, None)
    np.testing.assert_allclose(
        outputs.policy_log_probs, dense_log_probs(params, batch.pairs), rtol=1e-4
    )
    expected = dense_log_probs(frozen["reference"], batch.pairs)
    np.testing.assert_allclose(outputs.reference_log_probs, expected, rtol=1e-4)


def test_dpo_gradient_is_that_of_the_formula(world):
    """Equation 7 of arXiv:2305.18290 written out over full logits; the filler pair left out."""
    params, frozen, batch = world
    reference = dense_log_probs(frozen["reference"], batch.pairs)

    def plain(params):
        ratio = dense_log_probs(params, batch.pairs) - reference
        losses = jnp.log1p(jnp.exp(-0.3 * (ratio[:, 0] - ratio[:, 1])))
        return losses[:-1].mean()

    key = jax.random.key(0)
    grads, metrics, _ = gradients(objective_of("dpo", beta=0.3), params, frozen, batch, key)
    assert_trees_close(grads, jax.grad(plain)(params), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"].value(), plain(params), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "parts"),
    mostly_slow(
        itertools.product(["dpo", "simpo", "kto", "aot"], [2, 4]),
        quick=[("dpo", 4), ("simpo", 2), ("kto", 2), ("aot", 4)],
    ),
)
def test_micro_batches_give_the_full_batch_gradient(world, name, parts):
    params, frozen, batch = world
    whole = jax.jit(partial(gradients, objective_of(name)))(
        params, frozen, batch, jax.random.key(0)
    )
    split = jax.jit(partial(gradients, objective_of(name), micro_batches=parts))(
        params, frozen, batch, jax.random.key(0)
    )
    assert_trees_close(whole[0], split[0], atol=1e-5)
    assert_trees_close(
        {k: v.value() for k, v in whole[1].items()}, {k: v.value() for k, v in split[1].items()}
    )


def test_supervised_loss_is_the_mean_over_response_tokens(world):
    params, frozen, batch = world
    objective = SupervisedObjective(policy=Policy(config=CONFIG))
    _, metrics, _ = gradients(objective, params, frozen, batch.pairs, jax.random.key(0))
    total = dense_log_probs(params, batch.pairs)[:-1].sum()
    tokens = batch.pairs.response_length[:-1].sum()
    np.testing.assert_allclose(metrics["loss"].value(), -total / tokens, rtol=1e-5)


def run(world, mesh, steps=3, micro_batches=1):
    params, frozen, batch = jax.device_get(world)
    optimizer = optax.sgd(0.5)
    state = place(initial_state(params, optimizer, seed=0), mesh)
    frozen = {"policy": None, "reference": place(frozen["reference"], mesh)}
    step = compile_step(
        partial(
            train_step,
            objective=objective_of("dpo"),
            optimizer=optimizer,
            micro_batches=micro_batches,
        ),
        state,
        mesh,
    )
    history = []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        history.append(jax.device_get(metrics["loss"].value()))
    return jax.device_get(state.params), history


@pytest.fixture(scope="module")
def on_one_device(world):
    return run(world, make_mesh(devices=jax.devices()[:1]))


QUICK = [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2)]
MESHES = [x for x in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(x) == 8]


@pytest.mark.parametrize(
    "sizes",
    [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in MESHES],
    ids=lambda x: "x".join(map(str, x)),
)
def test_eight_devices_give_what_one_gives(world, on_one_device, sizes):
    """In every mesh of data x fsdp x sequence x tensor, joint rows and rows apart."""
    params, frozen, batch = world
    joined = dataclasses.replace(batch, pairs=with_joint_rows(batch.pairs))
    one, one_history = on_one_device
    mesh = make_mesh(**dict(zip(("data", "fsdp", "sequence", "tensor"), sizes, strict=True)))
    many, many_history = run((params, frozen, joined), mesh)
    np.testing.assert_allclose(one_history, many_history, rtol=1e-5)
    assert_trees_close(one, many, rtol=1e-4, atol=1e-5)


def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(world):
    params, frozen, batch = world
    poisoned = jax.tree.map(lambda x: x, params)
    poisoned["final_norm"]["scale"] = params["final_norm"]["scale"].at[0].set(jnp.inf)
    optimizer = optax.adam(1e-2)
    state = initial_state(poisoned, optimizer, seed=0)
    after, metrics = train_step(
        state, frozen, batch, objective=objective_of("dpo"), optimizer=optimizer
    )
    assert not bool(metrics["finite"])
    assert int(after.skipped) == 1
    assert int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, poisoned)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)


def dense_distributions(params, batch):
    """Next-token log-probs [pairs, 2, LENGTH - 1, vocabulary] and the mask of response tokens."""
    rows = batch.tokens.reshape(-1, LENGTH)
    logps = jax.nn.log_softmax(Decoder(CONFIG, params)(rows))[:, :-1]
    start = batch.prompt_length.reshape(-1, 1)
    position = jnp.arange(1, LENGTH)[None]
    scored = (position >= start) & (position < start + batch.response_length.reshape(-1, 1))
    return logps.reshape(PAIRS, 2, LENGTH - 1, -1), scored.reshape(PAIRS, 2, LENGTH - 1)


def test_tdpo_gradient_is_that_of_the_formula(world):
    """Equation 12 of arXiv:2404.11999 over full logits, both forms; the filler pair left out."""
    params, frozen, batch = world
    reference, scored = dense_distributions(frozen["reference"], batch.pairs)
    of_reference = dense_log_probs(frozen["reference"], batch.pairs)

    def plain(params, name):
        policy, _ = dense_distributions(params, batch.pairs)
        kl = jnp.where(scored, (jnp.exp(reference) * (reference - policy)).sum(-1), 0).sum(-1)
        ratio = dense_log_probs(params, batch.pairs) - of_reference
        margin = ratio[:, 0] - ratio[:, 1]
        if name == "tdpo1":
            offset = kl[:, 1] - kl[:, 0]
        else:
            offset = 0.5 * (kl[:, 1] - jax.lax.stop_gradient(kl[:, 0]))
        return jnp.log1p(jnp.exp(-0.1 * (margin - offset)))[:-1].mean()

    for name, loss in TOKEN_LOSSES.items():
        objective = TokenPreferenceObjective(policy=Policy(config=CONFIG), loss=loss, options={})
        grads, metrics, _ = gradients(objective, params, frozen, batch, jax.random.key(0))
        value, expected = jax.value_and_grad(plain)(params, name)
        np.testing.assert_allclose(metrics["loss"].value(), value, rtol=1e-5)
        assert_trees_close(grads, expected, rtol=1e-3, atol=1e-5)


def test_evaluation_reports_the_exact_divergence_per_chosen_token(world):
    params, frozen, batch = world
    evaluation = evaluate_preferences(objective_of("dpo"), [batch.pairs], make_mesh())
    got = evaluation(initial_state(params, optax.sgd(0.1), seed=0), frozen)
    policy, scored = dense_distributions(params, batch.pairs)
    reference, _ = dense_distributions(frozen["reference"], batch.pairs)
    kl = (jnp.exp(policy) * (policy - reference)).sum(-1)[:-1, 0]
    expected = jnp.where(scored[:-1, 0], kl, 0).sum() / scored[:-1, 0].sum()
    np.testing.assert_allclose(got["kl"], expected, rtol=1e-4)
    ratio = dense_log_probs(params, batch.pairs) - dense_log_probs(frozen["reference"], batch.pairs)
    margin = 0.1 * (ratio[:-1, 0] - ratio[:-1, 1])
    np.testing.assert_allclose(got["rewards/margins"], margin.mean(), rtol=1e-3)
    np.testing.assert_allclose(got["rewards/accuracies"], (margin > 0).mean(), rtol=1e-6)
