"""Reward and preference models in the step: gradients, parts, devices, adapters, calibration."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.models import decoder
from jaxalign.models.decoder import init_params
from jaxalign.models.lora import init_adapters, merge
from jaxalign.models.score import SCORE, init_head, with_head
from jaxalign.sharding import make_mesh, place
from jaxalign.training.calibration import reliability
from jaxalign.training.evaluation import evaluate_scores
from jaxalign.training.objectives import Policy
from jaxalign.training.reward_objectives import VALUES, ScoreObjective, comparison_values
from jaxalign.training.step import compile_step, gradients, initial_state, train_step
from tests.training.test_step import (
    CONFIG,
    LENGTH,
    PAIRS,
    QUICK,
    RESPONSE,
    assert_trees_close,
    make_batch,
    with_joint_rows,
)

FROZEN = {"policy": None}
LOSSES = pytest.mark.parametrize("name", VALUES)


def objective_of(name, policy=None, **options):
    policy = Policy(config=CONFIG) if policy is None else policy
    return ScoreObjective(policy=policy, values=VALUES[name], options=options)


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    params = with_head(init_params(CONFIG, jax.random.key(1)), init_head(16, jax.random.key(2)))
    return params, jax.tree.map(jnp.asarray, make_batch(rng))


def plain_scores(params, batch):
    """The head times the state of each row's last token, padding masked from the attention."""
    rows = batch.tokens.reshape(-1, LENGTH)
    lengths = (batch.prompt_length + batch.response_length).reshape(-1, 1)
    real = (jnp.arange(LENGTH)[None] < lengths).astype(jnp.int32)
    last = real - jnp.pad(real, ((0, 0), (0, 1)))[:, 1:]
    states = decoder.hidden_states(params, CONFIG, rows, decoder.Layout(attention_mask=real))
    return (states @ params[SCORE]["kernel"][:, 0] * last).sum(1).reshape(-1, 2)


PLAIN = {
    "bradley_terry": lambda s: jnp.log1p(jnp.exp(s[:, 1] - s[:, 0])),
    "preference_model": lambda s: (jnp.log1p(jnp.exp(-s[:, 0])) + jnp.log1p(jnp.exp(s[:, 1]))) / 2,
}


@LOSSES
def test_the_gradient_is_that_of_the_formula(world, name):
    params, batch = world

    def plain(params):
        return PLAIN[name](plain_scores(params, batch))[:-1].mean()  # the filler pair left out

    grads, metrics, _ = gradients(objective_of(name), params, FROZEN, batch, jax.random.key(0))
    value, expected = jax.value_and_grad(plain)(params)
    np.testing.assert_allclose(metrics["loss"].value(), value, rtol=1e-5)
    assert_trees_close(grads, expected, rtol=1e-3, atol=1e-5)


@LOSSES
def test_the_gradient_is_a_finite_difference(world, name):
    params, batch = world
    objective = objective_of(name)

    def loss(params):
        scores = objective.forward(params, FROZEN, batch, None)
        return objective.reduce(scores, batch, objective.count(batch))[0]

    grads = gradients(objective, params, FROZEN, batch, jax.random.key(0))[0]
    along = optax.tree.random_like(jax.random.key(5), params)
    slope = float(optax.tree.vdot(grads, along))
    ahead = loss(jax.tree.map(lambda x, y: x + 5e-4 * y, params, along))
    behind = loss(jax.tree.map(lambda x, y: x - 5e-4 * y, params, along))
    np.testing.assert_allclose((ahead - behind) / 1e-3, slope, rtol=2e-2, atol=1e-3)
    assert abs(slope) > 0.02


@LOSSES
def test_micro_batches_give_the_full_batch_gradient(world, name):
    params, batch = world
    batch = with_joint_rows(batch)
    whole, split = (
        jax.jit(partial(gradients, objective_of(name), micro_batches=parts))(
            params, FROZEN, batch, jax.random.key(0)
        )
        for parts in (1, 4)
    )
    assert_trees_close(whole[0], split[0], atol=1e-5)
    values = [{k: v.value() for k, v in one[1].items()} for one in (whole, split)]
    assert_trees_close(*values)


def run(world, mesh, name, steps=3):
    params, batch = jax.device_get(world)
    optimizer = optax.sgd(0.5)
    state = place(initial_state(params, optimizer, seed=0), mesh)
    step = partial(train_step, objective=objective_of(name), optimizer=optimizer)
    step, history = compile_step(step, state, mesh), []
    for _ in range(steps):
        state, metrics = step(state, FROZEN, batch)
        history.append(jax.device_get(metrics["loss"].value()))
    return jax.device_get(state.params), history


@pytest.fixture(scope="module")
def on_one_device(world):
    return run(world, make_mesh(devices=jax.devices()[:1]), "bradley_terry")


@pytest.mark.parametrize("sizes", QUICK, ids=lambda x: "x".join(map(str, x)))
def test_eight_devices_give_what_one_gives(world, on_one_device, sizes):
    """Joint rows on eight devices, rows apart on one."""
    params, batch = world
    one, one_history = on_one_device
    mesh = make_mesh(**dict(zip(("data", "fsdp", "sequence", "tensor"), sizes, strict=True)))
    many, many_history = run((params, with_joint_rows(batch)), mesh, "bradley_terry")
    np.testing.assert_allclose(one_history, many_history, rtol=1e-5)
    assert_trees_close(one, many, rtol=1e-4, atol=1e-5)


def test_adapters_and_head_are_trained_and_nothing_else(world):
    params, batch = world
    adapters = init_adapters(params, jax.random.key(3), rank=4, targets=("q", "down"))
    policy = Policy(config=CONFIG, adapter_scale=0.5, adapter_dropout=0.2)
    objective, frozen = objective_of("bradley_terry", policy), {"policy": params}
    trained = {**adapters, SCORE: params[SCORE]}
    np.testing.assert_allclose(
        objective.forward(trained, frozen, batch, None), plain_scores(params, batch), atol=1e-5
    )
    optimizer = optax.adam(0.03)
    state = initial_state(trained, optimizer, seed=0)
    step = jax.jit(partial(train_step, objective=objective, optimizer=optimizer))
    losses = []
    for _ in range(12):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"].value()))
    assert losses[-1] < 0.7 * losses[0]
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), state.params, trained)
    assert min(jax.tree.leaves(moved)) > 0.01
    after = {name: tree for name, tree in state.params.items() if name != SCORE}
    merged = with_head(merge(params, after, 0.5), state.params[SCORE])
    np.testing.assert_allclose(
        objective.forward(state.params, frozen, batch, None),
        plain_scores(merged, batch),
        atol=1e-4,
    )


def separable(rng, pairs, *, pairwise):
    """The better response holds a token that the worse one lacks; a comparison holds both."""
    tokens = rng.integers(3, 29, (pairs, 2, LENGTH)).astype(np.int32)
    if pairwise:  # prompt, A, separator, B, end
        better, worse = rng.integers(3, 12, (2, pairs, 3))
        better[np.arange(pairs), rng.integers(0, 3, pairs)] = 20
        for side, (a, b) in enumerate(((better, worse), (worse, better))):
            tokens[:, side, 3:6], tokens[:, side, 6], tokens[:, side, 7:10] = a, 2, b
            tokens[:, side, :3], tokens[:, side, 10:] = tokens[:, 0, :3] % 9 + 3, 1
    else:
        tokens[tokens == 20] = 3
        tokens[np.arange(pairs), 0, rng.integers(0, LENGTH - 1, pairs)] = 20
        tokens[:, :, -1] = 1
    return dataclasses.replace(
        make_batch(rng, pairs),
        tokens=tokens,
        prompt_length=np.full((pairs, 2), LENGTH - RESPONSE, np.int32),
        response_length=np.full((pairs, 2), RESPONSE, np.int32),
        weight=np.ones(pairs, np.float32),
    )


@LOSSES
def test_what_can_be_told_apart_is_learned(world, name, rng):
    """On pairs never trained on, accuracy (and agreement of both orders) reaches 1."""
    params, _ = world
    pairwise = name == "preference_model"
    objective, optimizer = objective_of(name), optax.adam(5e-3)
    state = initial_state(params, optimizer, seed=0)
    step = jax.jit(partial(train_step, objective=objective, optimizer=optimizer))
    for _ in range(200):
        state, _ = step(state, FROZEN, separable(rng, 32, pairwise=pairwise))
    fresh = separable(np.random.default_rng(99), 64, pairwise=pairwise)
    found = evaluate_scores(objective, [fresh], make_mesh())(state, FROZEN)
    assert found["rewards/accuracies"] == 1
    assert found.get("preferences/consistency", 1.0) == 1
    assert found["preferences/chosen"] > 0.9


def test_a_comparisons_numbers_are_those_of_the_exchanged_pair_reversed(rng):
    """Exchanging what is called chosen exchanges the columns: p becomes 1 - p."""
    scores = jnp.asarray(rng.normal(size=(50, 2)) * 3, jnp.float32)
    one, other = comparison_values(scores), comparison_values(scores[:, ::-1])
    np.testing.assert_allclose(
        one["preferences/chosen"], 1 - other["preferences/chosen"], atol=1e-6
    )
    np.testing.assert_allclose(one["rewards/margins"], -other["rewards/margins"], atol=1e-6)
    np.testing.assert_array_equal(one["preferences/consistency"], other["preferences/consistency"])
    z = np.asarray(scores, np.float64)
    p = (1 / (1 + np.exp(-z[:, 0])) + 1 - 1 / (1 + np.exp(-z[:, 1]))) / 2
    np.testing.assert_allclose(one["preferences/chosen"], p, atol=1e-6)
    agree = (z[:, 0] > 0) != (z[:, 1] > 0)
    np.testing.assert_array_equal(one["preferences/consistency"], agree)


def test_reliability_against_loops(rng):
    p = np.r_[rng.beta(2, 1.5, 300), 0.5, 1.0, 0.0]
    bins: list[list[float]] = [[] for _ in range(5)]
    right: list[list[float]] = [[] for _ in range(5)]
    for one in p:
        sure = max(one, 1 - one)
        place = min(int((sure - 0.5) / 0.1), 4)
        bins[place].append(sure)
        right[place].append(0.5 if one == 0.5 else float(one > 0.5))
    gaps = [
        len(b) / len(p) * abs(np.mean(b) - np.mean(r)) for b, r in zip(bins, right, strict=True)
    ]
    table = reliability(p, bins=5)
    np.testing.assert_allclose(table.error, sum(gaps), rtol=1e-9)
    assert [row["pairs"] for row in table.rows()] == [len(b) for b in bins]
    np.testing.assert_allclose(
        [row["accuracy"] for row in table.rows()], [np.mean(r) for r in right]
    )
    exchanged = reliability(1 - np.r_[1 - p], bins=5)
    np.testing.assert_allclose(exchanged.error, table.error)


def test_frequencies_that_are_the_probabilities_have_no_error(rng):
    p = rng.uniform(0.5, 1, 200_000)
    happened = np.where(rng.random(len(p)) < p, p, 1 - p)  # of the response that was preferred
    assert reliability(happened).error < 0.01
    overconfident = np.where(happened > 0.5, 0.99, 0.01)
    assert reliability(overconfident).error > 0.2


def test_evaluation_is_over_real_pairs_alone(world):
    params, batch = world
    evaluation = evaluate_scores(objective_of("bradley_terry"), [batch, batch], make_mesh())
    found = evaluation(initial_state(params, optax.sgd(0.1), seed=0), FROZEN)
    scores = np.asarray(plain_scores(params, batch), np.float64)[:-1]
    gap = scores[:, 0] - scores[:, 1]
    np.testing.assert_allclose(found["rewards/margins"], gap.mean(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found["loss"], np.log1p(np.exp(-gap)).mean(), rtol=1e-4)
    table = reliability(1 / (1 + np.exp(-gap)))
    np.testing.assert_allclose(found["calibration/error"], table.error, rtol=1e-3)
    pairs = sum(value for key, value in found.items() if key.endswith("/pairs"))
    assert pairs == 2 * (PAIRS - 1)


def test_margin_and_centring_reach_the_loss(world):
    params, batch = world
    scores = np.asarray(plain_scores(params, batch), np.float64)[:-1]
    expected = np.log1p(np.exp(0.7 - scores[:, 0] + scores[:, 1])) + 0.2 * scores.sum(1) ** 2
    objective = objective_of("bradley_terry", margin=0.7, centering=0.2)
    metrics = gradients(objective, params, FROZEN, batch, jax.random.key(0))[1]
    np.testing.assert_allclose(metrics["loss"].value(), expected.mean(), rtol=1e-4)
