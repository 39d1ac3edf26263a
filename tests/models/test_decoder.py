"""Laws of the decoder: causality, padding, packing, windows, rematerialisation, precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalign.errors import UserError
from jaxalign.models import Decoder, DecoderConfig, Rope, decoder, init_model
from jaxalign.models.compute import REMAT_POLICIES, Compute
from jaxalign.models.decoder import Layout, init_params, parameter_shapes, unembedding
from jaxalign.models.lora import with_adapters
from tests.slow import mostly_slow

PLAIN = DecoderConfig(
    vocab_size=31,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=8,
    mlp_width=24,
    context_length=64,
    initializer_range=0.4,
)
replace = dataclasses.replace
hidden_states = jax.jit(decoder.hidden_states, static_argnames=("config", "compute"))
logits = jax.jit(decoder.logits, static_argnames=("config", "compute"))
CONFIGS = {
    "plain": PLAIN,
    "window": replace(PLAIN, window=3, windowed=(True, True)),
    "mixed": replace(
        PLAIN,
        window=3,
        windowed=(True, False),
        local_rope=Rope(theta=50.0),
        attention_softcap=2.0,
        logit_softcap=5.0,
        norm_placement="sandwich",
        norm_offset=1.0,
        qk_norm="head",
        tied=True,
    ),
    "post": replace(PLAIN, norm_placement="post", qk_norm="width", rope=Rope(rotated=0.5)),
    "shared": replace(
        PLAIN,
        norm="layer",
        norm_bias=False,
        norm_placement="shared",
        rope=Rope(rotated=0.5, interleaved=True),
        unrotated=(False, True),
        window=3,
        windowed=(True, False),
        logit_scale=0.7,
    ),
    "multiplied": replace(PLAIN, embedding_scale=3.0, residual_scale=0.3, query_scale=0.2),
    "learned": replace(
        PLAIN,
        position_kind="learned",
        norm="layer",
        norm_placement="parallel",
        gated=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        activation="gelu",
    ),
}
every_config = pytest.mark.parametrize(
    "config",
    mostly_slow(CONFIGS.values(), [CONFIGS[x] for x in ("mixed", "post", "shared", "learned")]),
    ids=CONFIGS.keys(),
)


@functools.cache
def params_of(config):
    params = init_params(config, jax.random.key(3))
    noise = np.random.default_rng(4)  # biases and norms of no effect would hide errors
    return jax.tree.map(lambda x: x + 0.1 * noise.normal(size=x.shape).astype(np.float32), params)


def random_tokens(rng, rows=2, length=10):
    return jnp.asarray(rng.integers(0, PLAIN.vocab_size, (rows, length)), jnp.int32)


@every_config
def test_no_position_depends_on_later_tokens(config, rng):
    """The derivative of logits at t in the embedding of s is zero exactly where s > t."""
    params, tokens = params_of(config), random_tokens(rng, rows=1, length=6)
    table = params["embed"]["embedding"]

    def outputs(embedded):
        moved = params | {"embed": {"embedding": jnp.concatenate([table, embedded])}}
        fresh = config.vocab_size + jnp.arange(6)[None]
        return hidden_states(moved, config, fresh)[0].sum(-1)

    jacobian = np.abs(jax.jacobian(outputs)(table[tokens[0]])).sum(-1)
    depends = jacobian > 0
    assert not np.triu(depends, 1).any()
    assert depends.diagonal().all()
    if not config.windowed:
        assert depends[np.tril_indices(6)].all()


def test_a_window_ends_where_it_says(rng):
    """With one layer and a window of 3, position t sees t, t - 1 and t - 2 alone."""
    config = replace(CONFIGS["window"], layers=1, windowed=(True,))
    params, tokens = params_of(config), random_tokens(rng, rows=1, length=8)
    before = hidden_states(params, config, tokens)
    changed = tokens.at[0, 2].add(1) % config.vocab_size
    moved = np.abs(hidden_states(params, config, changed) - before)[0].max(-1) > 1e-6
    assert moved.tolist() == [False, False, True, True, True, False, False, False]


@every_config
def test_padding_changes_nothing(config, rng):
    """On the left or on the right; on the right even without a mask."""
    params, tokens, junk = params_of(config), random_tokens(rng), random_tokens(rng, length=5)
    nothing, ones = jnp.zeros_like(junk), jnp.ones_like(tokens)
    expected = logits(params, config, tokens)
    right = jnp.concatenate([tokens, junk], axis=1)
    left = jnp.concatenate([junk, tokens], axis=1)
    mask = jnp.concatenate([ones, nothing], axis=1)
    close = functools.partial(np.testing.assert_allclose, atol=2e-5)
    close(logits(params, config, right, Layout(attention_mask=mask))[:, :10], expected)
    close(logits(params, config, left, Layout(attention_mask=mask[:, ::-1]))[:, 5:], expected)
    close(logits(params, config, right)[:, :10], expected)


@every_config
def test_packed_documents_are_separate_rows(config, rng):
    """With positions derived from the segments, or given."""
    params = params_of(config)
    first, second = random_tokens(rng, 1, 7), random_tokens(rng, 1, 4)
    packed = jnp.concatenate([first, second, jnp.zeros((1, 3), jnp.int32)], axis=1)
    segments = jnp.asarray([[1] * 7 + [2] * 4 + [0] * 3])
    out = logits(params, config, packed, Layout(segment_ids=segments))
    alone = jnp.concatenate([first, jnp.pad(second, ((0, 0), (0, 3)))], axis=0)
    expected = logits(params, config, alone)
    np.testing.assert_allclose(out[0, :7], expected[0], atol=2e-5)
    np.testing.assert_allclose(out[0, 7:11], expected[1, :4], atol=2e-5)
    positions = jnp.asarray([[*range(7), *range(4), *range(3)]])
    given = logits(params, config, packed, Layout(segment_ids=segments, positions=positions))
    np.testing.assert_array_equal(given, out)


@every_config
def test_scanned_layers_are_layers_in_a_loop(config, rng):
    """Without jit, `jax.lax.scan` is a Python loop over the layers."""
    params, tokens = params_of(config), random_tokens(rng)
    scanned = hidden_states(params, config, tokens)
    with jax.disable_jit():
        looped = hidden_states(params, config, tokens)
    np.testing.assert_allclose(scanned, looped, atol=3e-5)


@pytest.mark.parametrize("policy", REMAT_POLICIES)
def test_rematerialisation_changes_no_gradient(policy, rng):
    config, tokens = PLAIN, random_tokens(rng)

    def loss(params, remat):
        return jnp.square(
            hidden_states(params, config, tokens, compute=Compute(remat=remat))
        ).mean()

    expected = jax.grad(loss)(params_of(config), "none")
    grads = jax.grad(loss)(params_of(config), policy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, expected)


def test_rematerialisation_is_really_on(rng):
    """What the forward pass leaves for the backward pass shrinks, policy by policy."""
    config = replace(PLAIN, layers=8, mlp_width=64)
    params, tokens = params_of(config), random_tokens(rng, rows=4, length=64)

    def residuals(remat):
        def loss(params):
            return decoder.hidden_states(params, config, tokens, compute=Compute(remat=remat)).sum()

        kept = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params))
        return sum(leaf.size for leaf in kept) - sum(x.size for x in jax.tree.leaves(params))

    none, dots, attention, full = map(residuals, ("none", "dots", "attention", "full"))
    stream = tokens.size * config.width
    assert 8 * stream < full < 13 * stream  # each layer's input; the final norm; angles
    assert full < attention < dots < 0.7 * none


def test_unknown_rematerialisation_is_refused(rng):
    with pytest.raises(UserError, match="remat: 'some' is not one of none, full"):
        hidden_states(params_of(PLAIN), PLAIN, random_tokens(rng), compute=Compute(remat="some"))


def test_learned_positions_do_not_reach_further(rng):
    config = CONFIGS["learned"]
    with pytest.raises(UserError, match="65 tokens, but llama has learned positions for 64"):
        hidden_states(params_of(config), config, random_tokens(rng, length=65))


@every_config
def test_bfloat16_is_close_and_parameters_stay_float32(config, rng):
    params, tokens = params_of(config), random_tokens(rng)
    exact = hidden_states(params, config, tokens)
    rough = hidden_states(params, config, tokens, compute=Compute(dtype=jnp.bfloat16))
    assert rough.dtype == jnp.bfloat16
    assert logits(params, config, tokens, compute=Compute(dtype=jnp.bfloat16)).dtype == jnp.float32
    error = np.linalg.norm(rough.astype(jnp.float32) - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.05  # 8 bits of mantissa


def test_gradients_of_bfloat16_computation_are_float32(rng):
    tokens = random_tokens(rng)
    loss = lambda p: hidden_states(p, PLAIN, tokens, compute=Compute(dtype=jnp.bfloat16)).sum()  # noqa: E731
    grads = jax.eval_shape(jax.grad(loss), params_of(PLAIN))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(grads)} == {"float32"}


def test_adapters_add_their_product_to_the_matrices(rng):
    config, tokens = PLAIN, random_tokens(rng)
    params = params_of(config)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    sizes = {"q": (16, 32), "o": (32, 16), "gate": (16, 24), "down": (24, 16)}
    adapters = {name: {"a": draw(2, n, 2), "b": draw(2, 2, m)} for name, (n, m) in sizes.items()}
    merged = {
        name: leaf | {"kernel": leaf["kernel"] + 0.3 * adapters[name]["a"] @ adapters[name]["b"]}
        for name, leaf in params["layers"].items()
        if name in adapters
    }
    expected = logits(params | {"layers": params["layers"] | merged}, config, tokens)
    adapted = logits(with_adapters(params, {"layers": adapters}, 0.3), config, tokens)
    np.testing.assert_allclose(adapted, expected, atol=1e-3, rtol=1e-4)
    assert np.abs(expected - logits(params, config, tokens)).max() > 0.1


@every_config
def test_logits_come_from_hidden_states_and_unembedding(config, rng):
    params, tokens = params_of(config), random_tokens(rng)
    kernel, bias = unembedding(params, config)
    out = hidden_states(params, config, tokens) @ kernel
    assert bias is None
    out = out * (config.logit_scale or 1.0)
    if config.logit_softcap:
        out = config.logit_softcap * np.tanh(out / config.logit_softcap)
    np.testing.assert_allclose(logits(params, config, tokens), out, atol=1e-5)


@every_config
def test_parameters_have_their_declared_shapes(config):
    params = init_params(config, jax.random.key(0))
    shapes = jax.tree.map(lambda x: x.shape, params)
    assert shapes == parameter_shapes(config)


def test_initial_parameters_have_their_declared_size():
    config = replace(PLAIN, width=64, mlp_width=256, initializer_range=0.02, norm_offset=1.0)
    params = init_params(config, jax.random.key(0))
    assert np.std(params["embed"]["embedding"]) == pytest.approx(0.02, rel=0.1)
    assert np.std(params["layers"]["up"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(params["layers"]["down"]["kernel"]) == pytest.approx(0.02 / 2, rel=0.05)
    assert np.all(np.asarray(params["final_norm"]["scale"]) == 0)  # 1 + 0
    assert not np.array_equal(params["layers"]["q"]["kernel"], params["layers"]["o"]["kernel"])


def test_shell_splits_merges_and_holds_plain_parameters(rng):
    model = init_model(PLAIN, jax.random.key(1))
    tokens = np.asarray(random_tokens(rng))
    graph, state = nnx.split(model)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model.params))
    doubled = nnx.merge(graph, jax.tree.map(lambda x: 2 * x, state))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), doubled.params, model.params)
    again = Decoder(PLAIN, model.params)
    np.testing.assert_array_equal(again(tokens), model(tokens))
    assert model(tokens).dtype == jnp.float32
    assert len(jax.tree.leaves(nnx.state(model, nnx.Param))) == len(jax.tree.leaves(model.params))


def test_compiled_program_does_not_grow_with_depth(rng):
    tokens = random_tokens(rng)

    def size(layers):
        config = replace(PLAIN, layers=layers)
        params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
        return len(jax.jit(lambda p: hidden_states(p, config, tokens)).lower(params).as_text())

    assert size(24) < 1.05 * size(3)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("norm", "batch", "norm: 'batch' is not one of"),
        ("kv_heads", 3, "heads: 4 is no multiple of kv_heads 3"),
        ("windowed", (True,), "windowed: 1 entries for 2 layers"),
        ("windowed", (True,) * 2, "window: missing"),
        ("width", 0, "width: 0 is not positive"),
    ],
)
def test_impossible_configs_are_refused(field, value, message):
    with pytest.raises(UserError, match=message):
        replace(PLAIN, **{field: value})


def test_impossible_rotary_positions_are_refused():
    with pytest.raises(UserError, match="rope kind: 'fast' is not one of default"):
        Rope(kind="fast")
    with pytest.raises(UserError, match="'llama3' needs factor"):
        Rope(kind="llama3")
    with pytest.raises(UserError, match="rotated fraction: 0"):
        Rope(rotated=0.0)
