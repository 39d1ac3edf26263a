"""Token against token: against dense gradients, the sum over the pair, and the closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.entanglement import two_pass_geometry
from jaxalign.entanglement.tokens import last_layer_geometry, token_geometry
from jaxalign.models import decoder, load_pretrained
from jaxalign.models.lora import init_adapters
from jaxalign.models.responses import response_log_probs
from jaxalign.rows import ResponseRows
from tests.entanglement.test_probing import folder_of, pairs_for, rows_of, small
from tests.slow import mostly_slow


def first_pair(batch):
    return ResponseRows(
        tokens=batch.tokens[0],
        prompt_length=batch.prompt_length[0],
        response_tokens=batch.response_tokens[0],
        response_length=batch.response_length[0],
    )


QUICK = ["llama_tied_groups", "gemma2", "gpt2", "gpt_oss", "t5_v1_1"]


@pytest.mark.parametrize(
    "name", mostly_slow([*QUICK, "granite", "cohere2", "gpt_neox", "olmoe"], quick=QUICK)
)
def test_the_matrix_is_that_of_dense_gradients_and_sums_to_the_pairs(name):
    model = load_pretrained(folder_of(name), dtype=jnp.float32)
    params, config = model.params, model.config
    batch = pairs_for(config.vocab_size, pairs=1)
    found = jax.jit(lambda p: token_geometry(p, config, first_pair(batch), chunk=2))(params)

    def log_probs(params):
        return response_log_probs(params, config, rows_of(batch)).log_prob

    leaves = jax.tree.leaves(jax.jit(jax.jacrev(log_probs))(params))
    dense = np.concatenate([np.asarray(x, np.float64).reshape(2, 5, -1) for x in leaves], -1)
    scale = np.sqrt((dense**2).sum(-1).max())
    np.testing.assert_allclose(found.inner, dense[0] @ dense[1].T, rtol=1e-4, atol=1e-4 * scale)
    np.testing.assert_allclose(found.chosen, (dense[0] ** 2).sum(-1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.rejected, (dense[1] ** 2).sum(-1), rtol=1e-4, atol=1e-6)

    whole = jax.jit(lambda p: two_pass_geometry(p, config, batch))(params)
    np.testing.assert_allclose(found.inner.sum(), whole.inner[0], rtol=1e-3)


def test_adapters_alone_and_the_chunk_does_not_matter():
    config = small(True)
    params = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
    adapters = init_adapters(params, jax.random.key(1), rank=2, targets=["q", "down"])
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    batch = pairs_for(config.vocab_size, pairs=1)
    one, three = (
        jax.jit(
            lambda a, chunk=chunk: token_geometry(
                params, config, first_pair(batch), adapters=a, adapter_scale=0.5, chunk=chunk
            )
        )(adapters)
        for chunk in (1, 3)
    )
    np.testing.assert_allclose(one.inner, three.inner, rtol=1e-4, atol=1e-6)
    whole = jax.jit(
        lambda a: two_pass_geometry(params, config, batch, adapters=a, adapter_scale=0.5)
    )(adapters)
    np.testing.assert_allclose(one.inner.sum(), whole.inner[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["llama2", "gemma2"])
def test_the_last_layer_in_closed_form(name):
    """The unembedding's own gradients; Gemma 2 caps its logits, and its embedding is tied."""
    model = load_pretrained(folder_of(name), dtype=jnp.float32)
    params, config = model.params, model.config
    batch = pairs_for(config.vocab_size, pairs=1)
    rows = rows_of(batch)
    found = last_layer_geometry(params, config, first_pair(batch))
    hidden = decoder.hidden_states(params, config, rows.tokens)
    places = rows.prompt_length[:, None] - 1 + jnp.arange(5)[None]
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)

    def log_probs(kernel):
        z = hidden @ kernel
        if config.logit_softcap is not None:
            z = config.logit_softcap * jnp.tanh(z / config.logit_softcap)
        table = jax.nn.log_softmax(z)
        return jnp.take_along_axis(table, rows.response_tokens[..., None], axis=-1)[..., 0]

    dense = jax.jacrev(log_probs)(decoder.unembedding(params, config)[0])
    dense = np.asarray(dense, np.float64).reshape(2, 5, -1)
    real = np.arange(5) < np.asarray(rows.response_length)[:, None]
    dense = np.where(real[..., None], dense, 0.0)
    np.testing.assert_allclose(found.inner, dense[0] @ dense[1].T, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.chosen, (dense[0] ** 2).sum(-1), rtol=1e-3, atol=1e-3)


def test_cosines_of_a_token_with_itself_are_one():
    config = small(False)
    params = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
    batch = pairs_for(config.vocab_size, pairs=1)
    pair = first_pair(batch)
    same = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), pair)
    found = jax.jit(lambda p: token_geometry(p, config, same))(params)
    real = int(same.response_length[0])
    np.testing.assert_allclose(jnp.diagonal(found.cosine)[:real], 1.0, rtol=1e-4)
    assert bool(jnp.isnan(jnp.diagonal(found.cosine)[real:]).all())
