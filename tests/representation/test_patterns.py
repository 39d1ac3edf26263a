"""Activity patterns, the fit to them and steering, where the answer is known beforehand."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.errors import UserError
from jaxalign.generation import Sampling, generate
from jaxalign.losses import hidden_state_distance, hidden_state_matching
from jaxalign.models import DecoderConfig
from jaxalign.models.compute import Compute
from jaxalign.models.decoder import (
    Layout,
    hidden_states,
    init_params,
    norm,
    states_at_layers,
    with_steering,
)
from jaxalign.models.lora import init_adapters, merge, with_adapters, with_dropout
from jaxalign.models.responses import response_log_probs
from jaxalign.representation import (
    Reader,
    RepresentationObjective,
    StimulusBatch,
    pooled,
    read_patterns,
    steering,
    summarise,
)
from jaxalign.rows import ResponseRows
from jaxalign.training.objectives import Policy
from jaxalign.training.step import gradients, initial_state, train_step

CONFIG = DecoderConfig(
    vocab_size=23,
    width=16,
    layers=4,
    heads=2,
    kv_heads=2,
    head_width=8,
    mlp_width=24,
    context_length=64,
    mlp_bias=True,
    gated=False,
    initializer_range=0.3,
)
BASE = init_params(CONFIG, jax.random.key(5))
BLOCK, LAYER = 1, 2  # what block 1 leaves is hidden state 2
SCALE = 0.5


def shifted_bias(params, vector, block=BLOCK):
    """A model whose block adds a vector to the residual stream at every position."""
    down = params["layers"]["down"]
    bias = down["bias"].at[block].add(jnp.asarray(vector, jnp.float32))
    return {**params, "layers": {**params["layers"], "down": {**down, "bias": bias}}}


def batch_of(rng, rows=4, length=12, positions=5, stimuli=True):
    prompt = rng.integers(1, 5, size=rows).astype(np.int32)
    response = rng.integers(1, positions + 1, size=rows)
    return StimulusBatch(
        tokens=rng.integers(0, 23, size=(rows, length)).astype(np.int32),
        prompt_length=prompt,
        stimuli=rng.integers(0, 23, size=(rows, 2, length + 6)).astype(np.int32),
        stimuli_prompt_length=np.stack([prompt + 3, prompt + 6], 1).astype(np.int32),
        mask=np.arange(positions)[None] < response[:, None],
        record_index=np.arange(rows, dtype=np.int32),
        weight=np.float32([1] * (rows - 1) + [0]),
    ) if stimuli else dataclasses.replace(
        batch_of(rng, rows, length, positions), stimuli=None, stimuli_prompt_length=None
    )  # fmt: skip


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_state_is_what_a_model_of_so_many_blocks_ends_with(remat, rng):
    tokens = jnp.asarray(rng.integers(0, 23, size=(3, 9)))
    places = jnp.tile(jnp.arange(9), (3, 1))
    where = {"layers": (0, 2, 4), "positions": places}
    read = states_at_layers(BASE, CONFIG, tokens, **where, compute=Compute(remat=remat))
    assert read.shape == (3, 3, 9, 16)
    np.testing.assert_allclose(read[:, 0], BASE["embed"]["embedding"][tokens], rtol=1e-6)
    for at, depth in ((1, 2), (2, 4)):
        shallow = dataclasses.replace(CONFIG, layers=depth)
        params = {**BASE, "layers": jax.tree.map(lambda x: x[:depth], BASE["layers"])}  # noqa: B023
        ended = norm(read[:, at], BASE["final_norm"], CONFIG)
        np.testing.assert_allclose(ended, hidden_states(params, shallow, tokens), atol=2e-5)


def test_places_are_picked_row_by_row_and_padding_on_the_left_changes_nothing(rng):
    tokens = jnp.asarray(rng.integers(0, 23, size=(2, 6)))
    places = jnp.array([[2, 3], [4, 5]])
    read = states_at_layers(BASE, CONFIG, tokens, layers=(3,), positions=places)
    every = jnp.tile(jnp.arange(6), (2, 1))
    whole = states_at_layers(BASE, CONFIG, tokens, layers=(3,), positions=every)
    np.testing.assert_allclose(read[1, 0], whole[1, 0, 4:6], rtol=1e-6)
    left = jnp.pad(tokens, ((0, 0), (4, 0)))
    mask = (jnp.arange(10)[None] >= 4) * jnp.ones((2, 1), jnp.int32)
    layout = Layout(attention_mask=mask)
    found = states_at_layers(BASE, CONFIG, left, layout, layers=(3,), positions=places + 4)
    np.testing.assert_allclose(found, read, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layers", [(), (3, 2), (5,), (-1, 2)])
def test_layers_that_there_are_not_are_refused(layers):
    tokens = jnp.zeros((1, 3), jnp.int32)
    with pytest.raises(UserError, match="layers"):
        states_at_layers(BASE, CONFIG, tokens, layers=layers, positions=tokens)


def test_a_planted_direction_is_found_from_its_layer_on(rng):
    """Two models a vector apart in one block's output: nothing before it, the vector there."""
    vector = rng.normal(size=16)
    models = {
        "positive": shifted_bias(BASE, vector / 2),
        "negative": shifted_bias(BASE, -vector / 2),
    }
    reader = Reader(config=CONFIG, layers=(1, 2, 3))
    batches = [batch_of(rng, stimuli=False) for _ in range(2)]
    parts = list(read_patterns(reader, models, batches))
    found = summarise(parts)
    np.testing.assert_allclose(found.direction[0], 0, atol=1e-6)
    np.testing.assert_allclose(found.direction[1], vector, atol=1e-4)
    assert found.coherence[0] == 0
    np.testing.assert_allclose(found.coherence[1], 1, rtol=1e-5)
    assert found.coherence[2] < 1 - 1e-4  # what the next block makes of it depends on the token
    np.testing.assert_allclose(found.norm[1], np.linalg.norm(vector), rtol=1e-4)
    assert found.tokens == sum(batch.mask[:3].sum() for batch in batches)
    positive, negative = pooled(parts)
    assert positive.shape == (6, 3, 16)
    np.testing.assert_allclose((positive - negative)[:, 1], np.tile(vector, (6, 1)), atol=1e-4)


def test_the_summary_is_that_of_all_tokens_at_once(rng):
    """In float64, token by token, whatever the batches."""
    reader = Reader(config=CONFIG, layers=(1, 4))
    models = {"positive": BASE, "negative": BASE}
    batches = [batch_of(rng), batch_of(rng, positions=3)]
    parts = list(read_patterns(reader, models, batches))
    gaps = [
        np.float64(part.positive[row, :, at] - part.negative[row, :, at])
        for part in parts
        for row, at in zip(*np.nonzero(part.mask), strict=True)
    ]
    gaps = np.stack(gaps)
    found = summarise(parts)
    np.testing.assert_allclose(found.direction, gaps.mean(0), rtol=1e-5, atol=1e-7)
    norms = np.linalg.norm(gaps, axis=-1)
    np.testing.assert_allclose(found.norm, norms.mean(0), rtol=1e-5)
    power = np.linalg.norm(gaps.mean(0), axis=-1) ** 2
    np.testing.assert_allclose(found.coherence, power / (norms**2).mean(0), rtol=1e-4)


def test_the_same_stimulus_twice_makes_no_pattern(rng):
    batch = batch_of(rng)
    same = np.repeat(batch.stimuli[:, :1], 2, axis=1)
    lengths = np.repeat(batch.stimuli_prompt_length[:, :1], 2, axis=1)
    batch = dataclasses.replace(batch, stimuli=same, stimuli_prompt_length=lengths)
    [part] = read_patterns(Reader(config=CONFIG, layers=(2,)), dict.fromkeys(SIDES, BASE), [batch])
    np.testing.assert_array_equal(part.positive, part.negative)


SIDES = ("positive", "negative")


def objective_of(alpha=2.0, layers=(1, 2, 3), loss=hidden_state_matching, dropout=0.0):
    policy = Policy(config=CONFIG, adapter_scale=SCALE, adapter_dropout=dropout)
    reader = Reader(config=CONFIG, layers=layers)
    return RepresentationObjective(policy=policy, reader=reader, alpha=alpha, loss=loss)


def frozen_of(**models):
    return {"policy": BASE, "positive": None, "negative": None} | models


def adapters_of(seed=1, rank=8, targets=("q", "v", "o", "up", "down")):
    return init_adapters(BASE, jax.random.key(seed), rank=rank, targets=targets)


def test_the_loss_is_the_formula_written_out(rng):
    batch = jax.tree.map(jnp.asarray, batch_of(rng))
    adapters = jax.tree.map(lambda x: x + 0.02, adapters_of())
    objective, options = objective_of(), {"layers": (1, 2, 3)}
    outputs = objective.forward(adapters, frozen_of(), batch, None)
    found = objective.reduce(outputs, batch, objective.count(batch))[0]

    def read(params, tokens, prompt_length):
        places = prompt_length[:, None] + jnp.arange(5)[None]
        states = states_at_layers(params, CONFIG, tokens, positions=places, **options)
        return np.asarray(states, np.float64)

    plain = batch.tokens, batch.prompt_length
    sides = [read(BASE, batch.stimuli[:, at], batch.stimuli_prompt_length[:, at]) for at in (0, 1)]
    gap = read(merge(BASE, adapters, SCALE), *plain) - read(BASE, *plain)
    gap -= 2.0 * (sides[0] - sides[1])
    mask = np.asarray(batch.mask) & (np.asarray(batch.weight) > 0)[:, None]
    expected = (np.square(gap).sum(-1).mean(1) * mask).sum() / mask.sum()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("loss", [hidden_state_matching, hidden_state_distance])
def test_without_alpha_new_adapters_are_at_the_minimum(loss, rng):
    batch = jax.tree.map(jnp.asarray, batch_of(rng))
    grads, metrics, _ = gradients(
        objective_of(alpha=0.0, loss=loss), adapters_of(), frozen_of(), batch, jax.random.key(0)
    )
    assert float(metrics["loss"].value()) == 0
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads)) == 0


def test_blocks_above_the_last_layer_get_no_gradient(rng):
    batch = jax.tree.map(jnp.asarray, batch_of(rng))
    adapters = jax.tree.map(lambda x: x + 0.02, adapters_of())
    grads = gradients(objective_of(layers=(1, 2)), adapters, frozen_of(), batch, jax.random.key(0))[
        0
    ]
    for leaf in jax.tree.leaves(grads):
        assert float(jnp.abs(leaf[:2]).max()) > 0
        assert float(jnp.abs(leaf[2:]).max()) == 0


def test_micro_batches_and_remat_give_the_batch_s_gradient(rng):
    batch = jax.tree.map(jnp.asarray, batch_of(rng))
    adapters = jax.tree.map(lambda x: x + 0.02, adapters_of())
    plain = objective_of()
    reader = dataclasses.replace(plain.reader, remat="full")
    again = dataclasses.replace(plain, reader=reader)
    arguments = adapters, frozen_of(), batch, jax.random.key(0)
    whole = gradients(plain, *arguments)
    parts = gradients(again, *arguments, micro_batches=2)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), whole[0], parts[0]
    )
    for name, mean in whole[1].items():
        if name != "pattern/cosine":  # a ratio of roots: of the parts' own
            np.testing.assert_allclose(mean.value(), parts[1][name].value(), rtol=1e-4, atol=1e-6)


def test_dropout_of_adapters_reaches_the_layers(rng):
    batch = jax.tree.map(jnp.asarray, batch_of(rng))
    adapters = jax.tree.map(lambda x: x + 0.05, adapters_of())
    objective, key = objective_of(dropout=0.5), jax.random.key(2)
    dropped = objective.forward(adapters, frozen_of(), batch, key).own
    places = batch.prompt_length[:, None] + jnp.arange(5)[None]
    seeded = with_adapters(BASE, with_dropout(adapters, key, rate=0.5), SCALE)
    expected = states_at_layers(seeded, CONFIG, batch.tokens, layers=(1, 2, 3), positions=places)
    np.testing.assert_allclose(dropped, expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(dropped, objective.forward(adapters, frozen_of(), batch, None).own)


def test_the_fit_reaches_base_plus_alpha_times_the_difference(rng, optimised):
    """Two models a planted vector apart: adapters take the base all the way, and no further."""
    vector = 0.3 * rng.normal(size=16)
    models = {
        side: shifted_bias(BASE, sign * vector) for side, sign in zip(SIDES, (1, -1), strict=True)
    }
    batch = jax.tree.map(jnp.asarray, batch_of(rng, positions=3, stimuli=False))
    objective, optimizer = objective_of(alpha=2.0, layers=(LAYER,)), optax.adam(2e-2)
    step = jax.jit(functools.partial(train_step, objective=objective, optimizer=optimizer))
    state = initial_state(adapters_of(rank=16), optimizer, seed=0)
    first = None
    for _ in range(300):
        state, metrics = step(state, frozen_of(**models), batch)
        first = metrics if first is None else first
    last = {name: float(metrics[name].value()) for name in metrics if "/" in name or name == "loss"}
    np.testing.assert_allclose(first["loss"].value(), 16 * (vector @ vector), rtol=1e-3)
    assert last["loss"] < 1e-3 * float(first["loss"].value())
    np.testing.assert_allclose(last["pattern/projection"], 2.0, rtol=0.02)
    np.testing.assert_allclose(last["pattern/cosine"], 1.0, rtol=1e-2)
    merged = merge(BASE, state.params, SCALE)
    own = objective.forward(state.params, frozen_of(), batch, None).own
    plain = dataclasses.replace(objective.policy, adapter_scale=None)
    again = dataclasses.replace(objective, policy=plain).forward(merged, frozen_of(), batch, None)
    np.testing.assert_allclose(again.own, own, atol=1e-4)


def test_a_steered_policy_samples_and_scores_as_one_with_the_vector_in_its_weights(rng):
    """Prefill, the cache's steps and the training forward agree with a shifted bias."""
    vector = rng.normal(size=16)
    added = steering(vector[None], (LAYER,), strength=0.7, depth=4)
    shifted = shifted_bias(BASE, 0.7 * vector)
    prompts, lengths = jnp.asarray(rng.integers(2, 23, size=(3, 4))), jnp.array([4, 2, 3])
    options = {"sampling": Sampling(max_tokens=6)}
    draw = jax.jit(lambda policy: generate([policy], CONFIG, prompts, lengths, KEY, **options))
    steered, expected = draw(with_steering(BASE, added)), draw(shifted)
    np.testing.assert_array_equal(steered.tokens, expected.tokens)
    np.testing.assert_allclose(steered.log_prob, expected.log_prob, atol=1e-4)
    assert not np.array_equal(steered.tokens, draw(BASE).tokens)
    rows = ResponseRows(
        tokens=jnp.concatenate([prompts[:1], steered.tokens[:1]], axis=1),
        prompt_length=jnp.array([4]),
        response_tokens=steered.tokens[:1],
        response_length=jnp.array([6]),
    )
    scored = response_log_probs(with_steering(BASE, added), CONFIG, rows).log_prob
    np.testing.assert_allclose(scored, steered.log_prob[:1], atol=1e-4)


KEY = jax.random.key(9)


def test_only_what_a_block_leaves_can_be_steered():
    with pytest.raises(UserError, match="steer at 1 to 4"):
        steering(np.zeros((1, 16)), (0,), strength=1.0, depth=4)


def test_an_encoder_decoder_is_refused():
    with pytest.raises(UserError, match="encoder-decoder"):
        Reader(config=types.SimpleNamespace(layers=2), layers=(1,))
