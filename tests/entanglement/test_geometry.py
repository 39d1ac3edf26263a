"""The pairs' Gram matrices against dense gradients, and against what a step really does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.data import PairBatch
from jaxalign.entanglement import coefficients, first_order_changes, pair_geometry
from jaxalign.losses import PairLogProbs, simpo
from jaxalign.models import DecoderConfig, EncoderDecoderConfig, decoder, encoder_decoder
from jaxalign.models.lora import init_adapters, with_adapters
from jaxalign.models.responses import response_log_probs

DECODER = DecoderConfig(
    vocab_size=23,
    width=8,
    layers=2,
    heads=2,
    kv_heads=1,
    head_width=4,
    mlp_width=12,
    context_length=16,
    tied=True,
)
ENCODER_DECODER = EncoderDecoderConfig(
    vocab_size=23,
    width=8,
    layers=1,
    decoder_layers=1,
    heads=2,
    head_width=4,
    mlp_width=12,
)
CASES = [(DECODER, decoder), (ENCODER_DECODER, encoder_decoder)]


@pytest.fixture
def batch(rng):
    """Three pairs; the second one's sides share their first tokens."""
    prompt, response = 4, 5
    tokens = rng.integers(1, 23, (3, 2, prompt + response)).astype(np.int32)
    tokens[:, 1, :prompt] = tokens[:, 0, :prompt]
    tokens[1, 1, : prompt + 3] = tokens[1, 0, : prompt + 3]
    lengths = rng.integers(2, response + 1, (3, 2)).astype(np.int32)
    real = np.arange(response) < lengths[..., None]
    tokens[:, :, prompt:] *= real
    return PairBatch(
        tokens=jnp.asarray(tokens),
        prompt_length=jnp.full((3, 2), prompt, jnp.int32),
        response_tokens=jnp.asarray(tokens[:, :, prompt:]),
        response_length=jnp.asarray(lengths),
        record_index=jnp.arange(3),
        weight=jnp.ones(3),
    )


def start(config, room, key=0):
    return jax.jit(room.init_params, static_argnums=0)(config, jax.random.key(key))


def log_probs(params, config, batch):
    """[pairs, 2], all pairs at once."""
    return response_log_probs(params, config, batch.rows()).log_prob.sum(-1).reshape(-1, 2)


def gram(function, trained):
    """The same by one Jacobian of all log-probs, flattened."""
    leaves = jax.tree.leaves(jax.jit(jax.jacrev(function))(trained))
    rows = np.concatenate([np.asarray(x).reshape(3, 2, -1) for x in leaves], axis=-1)
    return np.einsum("psn,prn->psr", rows, rows)


@pytest.mark.parametrize(("config", "room"), CASES, ids=["decoder", "encoder_decoder"])
def test_gram_is_that_of_the_jacobian(config, room, batch):
    params = start(config, room)
    expected = gram(lambda p: log_probs(p, config, batch), params)
    found = jax.jit(lambda p: pair_geometry(p, config, batch))(params)
    for field, value in (("chosen", (0, 0)), ("rejected", (1, 1)), ("inner", (0, 1))):
        wanted = expected[:, value[0], value[1]]
        np.testing.assert_allclose(getattr(found, field), wanted, rtol=1e-5, atol=1e-5)


def test_with_adapters_they_alone_are_the_parameters(batch):
    params = start(DECODER, decoder)
    adapters = init_adapters(params, jax.random.key(1), rank=2, targets=["q", "down"])
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    expected = gram(lambda a: log_probs(with_adapters(params, a, 0.5), DECODER, batch), adapters)
    found = jax.jit(lambda a: pair_geometry(params, DECODER, batch, adapters=a, adapter_scale=0.5))(
        adapters
    )
    np.testing.assert_allclose(found.inner, expected[:, 0, 1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.chosen, expected[:, 0, 0], rtol=1e-5, atol=1e-5)


def test_a_small_step_changes_log_probs_as_predicted(batch):
    """One step of gradient descent on one pair's loss, with coefficients that differ."""
    params, one = start(DECODER, decoder, key=3), jax.tree.map(lambda x: x[1:2], batch)

    def pairs_of(p):
        chosen, rejected = log_probs(p, DECODER, one).T
        lengths = one.response_length
        return PairLogProbs(
            chosen=chosen,
            rejected=rejected,
            reference_chosen=jnp.zeros(1),
            reference_rejected=jnp.zeros(1),
            chosen_length=lengths[:, 0],
            rejected_length=lengths[:, 1],
        )

    before, rate = pairs_of(params), 1e-3
    gradient = jax.jit(jax.grad(lambda p: simpo(pairs_of(p)).sum()))(params)
    after = pairs_of(jax.tree.map(lambda p, g: p - rate * g, params, gradient))
    predicted = first_order_changes(
        jax.jit(lambda p: pair_geometry(p, DECODER, one))(params),
        coefficients(simpo, before),
        learning_rate=rate,
    )
    realised = after.chosen - before.chosen, after.rejected - before.rejected
    for change, expected in zip(realised, predicted, strict=True):
        np.testing.assert_allclose(change, expected, rtol=0.03)


def test_identical_responses_are_one_vector(batch):
    same = dataclasses.replace(
        batch,
        tokens=batch.tokens[:, :1].repeat(2, axis=1),
        response_tokens=batch.response_tokens[:, :1].repeat(2, axis=1),
        response_length=batch.response_length[:, :1].repeat(2, axis=1),
    )
    found = jax.jit(lambda p: pair_geometry(p, DECODER, same))(start(DECODER, decoder))
    np.testing.assert_allclose(found.inner, found.chosen, rtol=1e-6)
    np.testing.assert_allclose(found.rejected, found.chosen, rtol=1e-6)
