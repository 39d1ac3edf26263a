"""Packed rollouts have the updates of padded ones, in rows of a few lengths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.data.packing import Packing
from jaxalign.models.decoder import init_params
from jaxalign.online import ALGORITHMS, OnlineObjective, PromptBatch
from jaxalign.online.packing import LEVELS, with_packed_rows
from jaxalign.online.sampler import Annotated, Sampled, rollout_batch
from jaxalign.online.step import update_step, with_history
from jaxalign.sharding import make_mesh, place, shard_batch
from jaxalign.training.objectives import Policy
from jaxalign.training.step import compile_step, initial_state
from tests.online.test_step import online, run
from tests.online.world import CONFIG

PROMPTS, WIDTH, RESPONSE = 8, 5, 6
LONGEST = WIDTH + RESPONSE, RESPONSE


def rollout(algorithm, seed=0, most=RESPONSE):
    """Random prompts and responses of many lengths; the last prompt has no verdict."""
    rng, samples = np.random.default_rng(seed), len(algorithm.draws)
    length = rng.integers(1, WIDTH + 1, PROMPTS).astype(np.int32)
    tokens = rng.integers(0, 4, (PROMPTS, WIDTH)).astype(np.int32)
    answers = rng.integers(0, 4, (PROMPTS, samples, RESPONSE)).astype(np.int32)
    spoken = rng.integers(1, most + 1, (PROMPTS, samples))
    real = np.arange(RESPONSE) < spoken[..., None]
    sampled = Sampled(
        tokens=answers * real,
        length=spoken,
        finished=np.ones((PROMPTS, samples), bool),
        log_prob={"policy": np.where(real, -rng.random(real.shape), 0.0).astype(np.float32)},
        texts=[[""] * samples] * PROMPTS,
    )
    win = rng.random((PROMPTS, samples, samples))
    reward = rng.random((PROMPTS, samples))
    reward[-1], win[-1] = np.nan, np.nan
    prompts = PromptBatch(
        tokens=tokens * (np.arange(WIDTH) >= WIDTH - length[:, None]),
        length=length,
        record_index=np.arange(PROMPTS, dtype=np.int32),
        weight=np.ones(PROMPTS, np.float32),
    )
    said = Annotated(preference=win, reward=reward)
    return rollout_batch(prompts, sampled, said, whole=True)


def packed_of(batch, algorithm, **rows):
    return with_packed_rows(batch, Packing(**rows), algorithm.trained, longest=LONGEST)


def updated(algorithm, batch, *, micro_batches=1, mesh=None):
    """Parameters and metrics after the updates on a rollout."""
    params = init_params(CONFIG, jax.random.key(0))
    if algorithm.has_critic:
        params = params | {"score": {"kernel": jnp.ones((CONFIG.width, 1))}}
    rule = with_history(algorithm, optax.sgd(0.1))
    objective = OnlineObjective(policy=Policy(config=CONFIG), algorithm=algorithm)
    step = functools.partial(
        update_step, objective=objective, optimizer=rule, micro_batches=micro_batches
    )
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    state = place(initial_state(params, rule, seed=0), mesh)
    reference = place(init_params(CONFIG, jax.random.key(1)), mesh)
    after, metrics = compile_step(step, state, mesh)(
        state, {"policy": None, "reference": reference}, shard_batch(batch, mesh)
    )
    values = {k: float(getattr(v, "value", lambda v=v: v)()) for k, v in metrics.items()}
    return jax.tree.map(np.asarray, after.params), values


@pytest.mark.parametrize(
    ("name", "options", "micro_batches", "shards"),
    [
        ("ipo_md", {}, 1, 1),
        ("ipo_md", {}, 2, 2),
        ("grpo", {"samples": 3, "updates": 2}, 2, 1),
        ("ppo", {"minibatches": 1}, 1, 1),
    ],
)
def test_the_update_is_that_of_padded_rows(name, options, micro_batches, shards):
    algorithm = ALGORITHMS[name](**options)
    batch = rollout(algorithm)
    packed = packed_of(batch, algorithm, shards=shards, micro_batches=micro_batches)
    rows = packed.responses.packed
    assert rows.tokens.shape[0] == shards * micro_batches
    tokens = batch.responses.prompt_length + batch.responses.response_length
    assert (rows.segment_ids > 0).sum() == tokens[:, : algorithm.trained].sum()
    mesh = make_mesh(devices=jax.devices()[:shards])
    found, metrics = updated(algorithm, packed, micro_batches=micro_batches, mesh=mesh)
    expected, wanted = updated(algorithm, batch, micro_batches=micro_batches)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6), found, expected
    )
    assert metrics == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert metrics["grad_norm"] > 1e-3


def test_rows_have_few_lengths():
    algorithm = ALGORITHMS["ipo_md"]()
    shapes = set()
    for seed in range(60):
        batch = rollout(algorithm, seed, most=seed % RESPONSE + 1)
        packed = packed_of(batch, algorithm, micro_batches=2).responses.packed
        shapes.add((packed.tokens.shape, packed.scored_tokens.shape))
        assert packed.tokens.size <= PROMPTS * algorithm.trained * sum(LONGEST[:1])
    assert 2 < len(shapes) <= LEVELS


def test_a_step_with_packed_rows_is_that_with_padded_rows_and_repeats_exactly():
    packed, again, padded = (online("ipo_md", optimizer=optax.sgd(0.1)) for _ in range(3))
    for step, *_ in (packed, again):
        step.packing = Packing()
    (state, lines), (same, _), (expected, wanted) = (
        run(*world, steps=2, number=8) for world in (packed, again, padded)
    )
    jax.tree.map(np.testing.assert_array_equal, state.params, same.params)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        state.params,
        expected.params,
    )
    assert lines[1]["loss"] == pytest.approx(wanted[1]["loss"], rel=1e-4)
