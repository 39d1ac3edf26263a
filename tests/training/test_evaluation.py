"""Held-out numbers do not depend on how the held-out set is cut, nor on how many devices share it.

The batches come from the project's own data path: a last batch is filled up with rows of weight 0.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.data import TokenizedPairs, TokenizedRows, pair_batches
from jaxalign.losses import BATCH_COUPLED, PREFERENCE_LOSSES, PairLogProbs, statistics_of
from jaxalign.models import DecoderConfig
from jaxalign.models.decoder import init_params
from jaxalign.sharding import make_mesh, place
from jaxalign.training.evaluation import evaluate_preferences
from jaxalign.training.objectives import Policy, PreferenceObjective, ReferencedBatch
from jaxalign.training.step import compile_step, initial_state, train_step

CONFIG = DecoderConfig(
    vocab_size=23,
    width=16,
    layers=1,
    heads=2,
    kv_heads=1,
    head_width=8,
    mlp_width=16,
    context_length=32,
    tied=True,
)
NUMBER = 11
PARAMS, REFERENCE = (init_params(CONFIG, jax.random.key(seed)) for seed in (1, 2))
RUNNING = {"threshold": 0.7, "mean_log_ratio": -0.4, "responses": 12.0}


def make_pairs():
    rng = np.random.default_rng(3)
    prompts = np.repeat(rng.integers(1, 6, NUMBER), 2)
    lengths = prompts + rng.integers(1, 10, 2 * NUMBER)
    return TokenizedPairs(
        rows=TokenizedRows(
            flat=rng.integers(1, 23, lengths.sum()).astype(np.int32),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            prompt_length=prompts.astype(np.int32),
            record_index=np.repeat(np.arange(NUMBER), 2),
        )
    )


PAIRS = make_pairs()


def objective_of(loss, options=None):
    return PreferenceObjective(
        policy=Policy(config=CONFIG), loss=loss, options=options or {}, coupled=True
    )


def state_of(loss, mesh=None):
    start = {name: RUNNING[name] for name in statistics_of(loss).start}
    return initial_state(PARAMS, optax.sgd(0.1), seed=0, running=start)


def held_out(loss, batch_size, devices=1):
    mesh = make_mesh(devices=jax.devices()[:devices])
    batches = list(pair_batches(PAIRS, batch_size=batch_size, epochs=1, shuffle=False))
    frozen = {"policy": None, "reference": place(REFERENCE, mesh)}
    state = place(state_of(loss), mesh)
    return evaluate_preferences(objective_of(loss), batches, mesh)(state, frozen)


def all_pairs():
    """Log-probs of all held-out pairs in one batch without filler, in order."""
    [batch] = pair_batches(PAIRS, batch_size=NUMBER, epochs=1, shuffle=False, window=1)
    batch = ReferencedBatch(pairs=jax.tree.map(jnp.asarray, batch), reference=None)
    frozen = {"policy": None, "reference": REFERENCE}
    outputs = objective_of(PREFERENCE_LOSSES["dpo"]).forward(PARAMS, frozen, batch, None)
    return PairLogProbs(
        chosen=outputs.policy_log_probs[:, 0],
        rejected=outputs.policy_log_probs[:, 1],
        reference_chosen=outputs.reference_log_probs[:, 0],
        reference_rejected=outputs.reference_log_probs[:, 1],
        chosen_length=batch.pairs.response_length[:, 0],
        rejected_length=batch.pairs.response_length[:, 1],
    )


def expected_loss(name):
    """The loss of the whole held-out set; bco's shift and beta_dpo's M_0 as training left them."""
    remembered = {"bco": ("mean_log_ratio",), "beta_dpo": ("threshold",)}.get(name, ())
    options = {key: jnp.float32(RUNNING[key]) for key in remembered}
    return float(PREFERENCE_LOSSES[name](all_pairs(), **options).mean())


@pytest.mark.parametrize("name", sorted(BATCH_COUPLED))
def test_a_held_out_loss_takes_its_statistics_over_the_whole_set(name):
    loss = PREFERENCE_LOSSES[name]
    expected = expected_loss(name)
    found = {
        (batch_size, devices): held_out(loss, batch_size, devices)
        for batch_size, devices in ((11, 1), (3, 1), (8, 8))
    }
    for numbers in found.values():
        np.testing.assert_allclose(numbers["loss"], expected, rtol=1e-5)
        for metric, value in numbers.items():
            np.testing.assert_allclose(value, found[11, 1][metric], rtol=1e-4, err_msg=metric)


def test_a_loss_that_couples_its_pairs_undeclared_is_held_out_as_a_whole_too():
    def centred(pairs):
        return jnp.square(pairs.margin - pairs.margin.mean())

    mesh = make_mesh(devices=jax.devices()[:1])
    frozen = {"policy": None, "reference": REFERENCE}
    state = initial_state(PARAMS, optax.sgd(0.1), seed=0)
    expected = float(centred(all_pairs()).mean())
    for batch_size in (3, 11):
        batches = list(pair_batches(PAIRS, batch_size=batch_size, epochs=1, shuffle=False))
        found = evaluate_preferences(objective_of(centred), batches, mesh)(state, frozen)
        np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)


def one_step(name, micro_batches=1, devices=1):
    """The state after one step on eight pairs, the last two of which only fill the batch up."""
    mesh = make_mesh(devices=jax.devices()[:devices])
    batch = next(pair_batches(PAIRS, batch_size=8, epochs=1, shuffle=False))
    weight = np.r_[np.ones(6), np.zeros(2)].astype(np.float32)
    batch = ReferencedBatch(pairs=dataclasses.replace(batch, weight=weight), reference=None)
    loss, optimizer = PREFERENCE_LOSSES[name], optax.sgd(0.1)
    state = place(state_of(loss), mesh)
    step = partial(
        train_step,
        objective=objective_of(loss),
        optimizer=optimizer,
        micro_batches=micro_batches,
    )
    frozen = {"policy": None, "reference": place(REFERENCE, mesh)}
    after, metrics = compile_step(step, state, mesh)(state, frozen, batch)
    return jax.device_get((after, metrics["loss"].value()))


@pytest.mark.parametrize("name", sorted(BATCH_COUPLED))
def test_a_step_takes_its_statistics_over_the_rows_that_count(name):
    """Whatever the filler rows hold, and however micro-batches and devices share the batch."""
    alone, value = one_step(name)
    other, other_value = one_step(name, micro_batches=2, devices=4)
    np.testing.assert_allclose(other_value, value, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), other, alone)
    pairs = jax.tree.map(lambda x: x[:6], all_pairs_of_first_batch())
    weightless = {"bco": bco_shift, "beta_dpo": beta_threshold}.get(name, lambda pairs: {})(pairs)
    expected = PREFERENCE_LOSSES[name](pairs, **weightless).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-4)


def all_pairs_of_first_batch():
    batch = next(pair_batches(PAIRS, batch_size=8, epochs=1, shuffle=False))
    index = jnp.asarray(batch.record_index)
    return jax.tree.map(lambda x: x[index], all_pairs())


def bco_shift(pairs):
    both = np.concatenate([pairs.chosen_log_ratio, pairs.rejected_log_ratio])
    total = RUNNING["mean_log_ratio"] * RUNNING["responses"] + both.sum()
    return {"mean_log_ratio": jnp.float32(total / (RUNNING["responses"] + len(both)))}


def beta_threshold(pairs):
    mean = float(np.mean(pairs.margin))
    return {"threshold": jnp.float32(0.9 * RUNNING["threshold"] + 0.1 * mean)}


def test_a_loss_without_a_reference_runs_none(rng):
    """No reference parameters, no rewards, no divergence: the same loss and gradient."""
    loss = PREFERENCE_LOSSES["simpo"]
    mesh = make_mesh(devices=jax.devices()[:1])
    with_one = PreferenceObjective(policy=Policy(config=CONFIG), loss=loss, options={})
    without = dataclasses.replace(with_one, has_reference=False)
    batches = list(pair_batches(PAIRS, batch_size=4, epochs=1, shuffle=False))
    state = initial_state(PARAMS, optax.sgd(0.1), seed=0)
    batch = ReferencedBatch(pairs=jax.tree.map(jnp.asarray, batches[0]), reference=None)
    found = []
    for objective, reference in ((with_one, REFERENCE), (without, None)):
        frozen = {"policy": None, "reference": reference}
        numbers = evaluate_preferences(objective, batches, mesh)(state, frozen)
        step = jax.jit(partial(train_step, objective=objective, optimizer=optax.sgd(0.1)))
        after, _ = step(state, frozen, batch)
        found.append((numbers, after))
    (numbers, after), (fewer, same) = found
    left_out = {f"rewards/{x}" for x in ("chosen", "rejected", "margins", "accuracies")} | {"kl"}
    assert set(numbers) - set(fewer) == left_out
    for name, value in fewer.items():
        np.testing.assert_allclose(value, numbers[name], rtol=1e-6)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8)  # two programs' rounding
    jax.tree.map(close, same.params, after.params)
