"""Geometry read off one backward pass, for every family, form and part, against dense gradients."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.data import PairBatch
from jaxalign.entanglement import pair_geometry, probing, two_pass_geometry
from jaxalign.models import DecoderConfig, decoder, devices, load_pretrained, logprobs, probes
from jaxalign.models.compute import Compute
from jaxalign.models.responses import response_log_probs
from jaxalign.rows import ResponseRows
from tests.slow import mostly_slow

FIXTURES = Path(__file__).parents[1] / "fixtures"


def folder_of(name):
    """A fixture that makes log-probs."""
    kinds = ("models", "encoder_decoders")
    return next(path for kind in kinds if (path := FIXTURES / kind / name).is_dir())


FAMILIES = [  # one of every way to use a parameter
    "cohere2_biases",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "granitemoehybrid",
    "llama3",
    "olmo2",
    "olmo3_yarn",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "smollm3_window",
    "t5",
    "t5_v1_1",
]
QUICK = [  # the others use their parameters as one of these does
    *("cohere2_biases", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "granite"),
    *("llama3", "olmo2", "qwen2", "t5"),
]
FORMS = {
    "formed, one by one": (True, True),
    "formed, at once": (True, False),
    "products, one by one": (False, True),
    "products, at once": (False, False),
}


def pairs_for(vocabulary, *, pairs=3, prompt=4, response=5, seed=0):
    """Pairs of random tokens with repeated ones, padded, some sharing their first tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, min(vocabulary, 9), (pairs, 2, prompt + response)).astype(np.int32)
    tokens[:, 1, :prompt] = tokens[:, 0, :prompt]
    lengths = rng.integers(2, response + 1, (pairs, 2)).astype(np.int32)
    tokens[:, :, prompt:] *= np.arange(response) < lengths[..., None]
    return PairBatch(
        tokens=jnp.asarray(tokens),
        prompt_length=jnp.full((pairs, 2), prompt, jnp.int32),
        response_tokens=jnp.asarray(tokens[:, :, prompt:]),
        response_length=jnp.asarray(lengths),
        record_index=jnp.arange(pairs),
        weight=jnp.ones(pairs),
    )


def rows_of(batch):
    """As `PairBatch.rows`, written out."""
    names = "tokens", "prompt_length", "response_tokens", "response_length"
    fields = {name: getattr(batch, name) for name in names}
    return ResponseRows(**{name: x.reshape(-1, *x.shape[2:]) for name, x in fields.items()})


def dense(params, config, batch):
    """Path of each parameter's node -> gradients [pairs, 2, layers, size], by a Jacobian."""

    def log_probs(params):
        return response_log_probs(params, config, rows_of(batch)).log_prob.sum(-1)

    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.jacrev(log_probs))(params)):
        names = [entry.key for entry in path[:-1]]
        layers = leaf.shape[1] if "layers" in names else 1
        own = np.asarray(leaf, np.float64).reshape(-1, 2, layers, leaf[0].size // layers)
        found.setdefault("/".join(names), []).append(own)
    return {path: np.concatenate(parts, axis=-1) for path, parts in found.items()}


def expected(own):
    """[pairs, layers, 3] of [pairs, 2, layers, size]."""
    chosen, rejected = own[:, 0], own[:, 1]
    of_sides = [(chosen, chosen), (rejected, rejected), (chosen, rejected)]
    return np.stack([np.sum(x * y, axis=-1) for x, y in of_sides], axis=-1)


def compare(found, wanted):
    scale = np.sqrt(wanted[..., :1] * wanted[..., 1:2])
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5 * scale.max())


def small(tied):
    return DecoderConfig(
        vocab_size=23,
        width=8,
        layers=2,
        heads=2,
        kv_heads=1,
        head_width=4,
        mlp_width=12,
        context_length=16,
        tied=tied,
    )


@pytest.mark.parametrize("name", mostly_slow(FAMILIES, quick=QUICK))
def test_every_family(name):
    # In t5_v1_1 attention is not scaled down: moving its weights by one part in 10 million moves
    # either way's numbers by one in 100,000.
    tolerance = 1e-4 if name == "t5_v1_1" else 1e-5
    model = load_pretrained(folder_of(name), dtype=jnp.float32)
    batch = pairs_for(model.config.vocab_size)
    ways = two_pass_geometry, pair_geometry
    wanted, found = (jax.jit(lambda p, f=f: f(p, model.config, batch))(model.params) for f in ways)
    scale = jnp.sqrt(wanted.chosen * wanted.rejected)
    np.testing.assert_allclose(found.chosen, wanted.chosen, rtol=tolerance)
    np.testing.assert_allclose(found.rejected, wanted.rejected, rtol=tolerance)
    np.testing.assert_allclose(found.inner / scale, wanted.inner / scale, atol=1e-5)


# Each form with tied or untied embeddings, each of the two ways with both.
TIED_FORMS = {name: name in ("formed, one by one", "products, at once") for name in FORMS}


@pytest.mark.parametrize(
    ("form", "tied"),
    mostly_slow(itertools.product(FORMS, [True, False]), quick=TIED_FORMS.items()),
)
def test_every_form_and_every_part(form, tied, monkeypatch):
    formed, one_by_one = FORMS[form]
    for module in (probes, logprobs):
        monkeypatch.setattr(module, "forms_gradients", lambda *_: formed)
    monkeypatch.setattr(devices, "is_single_cpu", lambda: one_by_one)
    config = small(tied)
    params = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
    batch = pairs_for(config.vocab_size)
    rows = rows_of(batch)
    zeros = probing.zero_probes(params, config, rows)

    def log_probs(zeros):
        watched, blocks = probes.with_probes(params, zeros), Compute(vocab_block=9)
        return response_log_probs(watched, config, rows, compute=blocks).log_prob.sum()

    cotangents = jax.jit(jax.grad(log_probs))(zeros)
    found = probing.contributions(cotangents, config, rows)
    wanted = dense(params, config, batch)
    assert set(found) == set(wanted)
    for path, own in wanted.items():
        value = found[path] if found[path].ndim == 3 else found[path][:, None]
        compare(value, expected(own))


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_gradient_of_a_watched_pass_is_that_of_the_plain_one(remat):
    config = small(True)
    params = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
    rows = rows_of(pairs_for(config.vocab_size))
    zeros = probing.zero_probes(params, config, rows)
    weights = jnp.linspace(-1.0, 2.0, 6)

    def loss(params, zeros):
        watched = probes.with_probes(params, zeros)
        out = response_log_probs(watched, config, rows, compute=Compute(remat=remat))
        return jnp.sum(jnp.tanh(weights * out.log_prob.sum(-1)))

    plain, watched = (jax.jit(jax.grad(loss))(params, z) for z in ({}, zeros))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(watched), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_small_weights_divide_out_and_smaller_ones_are_not_a_number():
    weighted = jnp.array([[4e-20, 9.0, 6e-10], [1.0, 1.0, 1.0]])
    weights = jnp.array([[1e-10, 3.0], [0.0, 1.0]])
    found = probing.unweighted(weighted, weights)
    np.testing.assert_allclose(found.chosen, [4.0, np.nan], rtol=1e-6)
    np.testing.assert_allclose(found.rejected, [1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(found.inner, [2.0, np.nan], rtol=1e-6)


def test_bfloat16_stays_close_to_float32():
    config = small(False)
    params = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
    batch = pairs_for(config.vocab_size)
    exact = jax.jit(lambda p: two_pass_geometry(p, config, batch))(params)
    rough = Compute(dtype=jnp.bfloat16)
    half = jax.jit(lambda p: pair_geometry(p, config, batch, compute=rough))(params)
    np.testing.assert_allclose(half.chosen, exact.chosen, rtol=0.03)
    scale = jnp.sqrt(exact.chosen * exact.rejected)
    np.testing.assert_allclose(half.inner / scale, exact.inner / scale, atol=0.02)
