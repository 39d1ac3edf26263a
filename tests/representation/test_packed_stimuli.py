"""Packed stimuli have the states, gradients and metrics of padded ones."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.data.packing import Packing
from jaxalign.losses import hidden_state_matching
from jaxalign.models import devices
from jaxalign.models.lora import init_adapters
from jaxalign.representation import (
    Reader,
    RepresentationObjective,
    stimulus_batches,
    stimulus_positions,
)
from jaxalign.training.objectives import Policy
from jaxalign.training.step import gradients
from tests.data.test_batches import make_rows
from tests.representation.test_patterns import BASE, CONFIG

RNG = np.random.default_rng(0)
PROMPTS, RESPONSES = RNG.integers(1, 12, 21), RNG.integers(1, 14, 21)


def rows_of(more, seed):
    """The same responses after prompts that are longer by so many tokens."""
    rows = make_rows(PROMPTS + more + RESPONSES, PROMPTS + more, seed)
    rows.flat[:] %= CONFIG.vocab_size
    for at, (prompt, size) in enumerate(zip(rows.prompt_length, RESPONSES, strict=True)):
        rows[at][prompt:] = np.arange(at, at + size) % CONFIG.vocab_size
    return rows


STREAMS = [rows_of(more, seed) for seed, more in enumerate((0, 3, 6))]


def batches_of(stimuli, micro_batches, **order):
    options = {"positions": 6, "batch_size": 8, "epochs": 1} | order
    packing = Packing(micro_batches=micro_batches)
    streams = STREAMS[0], STREAMS[1:] if stimuli else ()
    batches = list(stimulus_batches(*streams, packing=packing, **options))
    assert all(batch.packed is not None for batch in batches)
    return batches


@pytest.mark.parametrize(
    ("stimuli", "micro_batches", "one_cpu"), [(True, 1, True), (True, 2, False), (False, 1, False)]
)
def test_gradients_and_metrics(stimuli, micro_batches, one_cpu, monkeypatch):
    monkeypatch.setattr(devices, "is_single_cpu", lambda: one_cpu)
    monkeypatch.setattr("jaxalign.models.attention.PACKED_BLOCK", 8)
    objective = RepresentationObjective(
        policy=Policy(config=CONFIG, adapter_scale=0.5),
        reader=Reader(config=CONFIG, layers=(1, 3)),
        alpha=2.0,
        loss=hidden_state_matching,
    )
    adapters = init_adapters(BASE, jax.random.key(2), rank=2, targets=["q", "v"])
    adapters = jax.tree.map(lambda x: x + 0.2, adapters)
    other = jax.tree.map(lambda x: 0.9 * x, BASE)
    frozen = {"policy": BASE, "positive": None, "negative": None if stimuli else other}
    run = jax.jit(partial(gradients, objective, micro_batches=micro_batches))
    for batch in batches_of(stimuli, micro_batches):
        plain = dataclasses.replace(batch, packed=None, packed_stimuli=None)
        packed, padded = (
            run(adapters, frozen, jax.tree.map(jnp.asarray, x), jax.random.key(0))
            for x in (batch, plain)
        )
        for at in (0, 1):
            jax.tree.map(
                partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), packed[at], padded[at]
            )
    assert float(padded[1]["pattern/norm"].value()) > 0.1


def test_every_response_comes_once_with_its_stimuli():
    seen = []
    for batch in batches_of(True, 2, seed=3):
        for at, number in enumerate(batch.record_index):
            for side, packed in enumerate([batch.packed, *batch.packed_stimuli]):
                size = RESPONSES[number]
                own = slice(packed.scored_start[at, 0], packed.scored_start[at, 0] + size)
                found = packed.scored_tokens[packed.row[at]][own]
                np.testing.assert_array_equal(found, STREAMS[side][int(number)][-size:])
        seen += batch.record_index[batch.weight > 0].tolist()
    assert sorted(seen) == list(range(21))


def test_positions_count_all_streams():
    packing, order = Packing(micro_batches=2), {"batch_size": 8, "seed": 3}
    stream = stimulus_batches(STREAMS[0], STREAMS[1:], positions=6, packing=packing, **order)
    batch = next(stream)
    rows = [batch.packed, *batch.packed_stimuli]
    assert stimulus_positions(STREAMS[0], STREAMS[1:], packing, **order) == sum(
        x.tokens.size for x in rows
    )
    padded = stimulus_positions(STREAMS[0], STREAMS[1:], None, **order)
    assert padded > sum(x.tokens.size for x in rows)
