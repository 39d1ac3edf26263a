"""Adapters: what they compute, how they are trained, dropped out and merged."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.models import DecoderConfig
from jaxalign.models.compute import Compute
from jaxalign.models.decoder import hidden_states, init_params, logits, parameter_shapes
from jaxalign.models.layers import dense
from jaxalign.models.lora import (
    count,
    init_adapters,
    items,
    matrix_shapes,
    merge,
    stack,
    with_adapters,
    with_dropout,
)
from jaxalign.models.responses import response_log_probs
from jaxalign.rows import ResponseRows

CONFIG = DecoderConfig(
    vocab_size=31,
    width=16,
    layers=3,
    heads=2,
    kv_heads=1,
    head_width=8,
    mlp_width=24,
    context_length=32,
)
EVERY = ("q", "k", "v", "o", "gate", "up", "down")
SCALE = 0.7
RANK_TWO = {"rank": 2, "targets": EVERY}


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(1))


@pytest.fixture(scope="module")
def adapters(params):
    """With a B that is not zero, as after some training."""
    made = init_adapters(params, jax.random.key(2), rank=3, targets=EVERY)
    noise = np.random.default_rng(3)
    return jax.tree.map(
        lambda x: jnp.asarray(x + 0.2 * noise.normal(size=x.shape), jnp.float32), made
    )


@pytest.fixture
def tokens(rng):
    return jnp.asarray(rng.integers(0, 31, (2, 9)), jnp.int32)


def test_new_adapters_change_nothing(params, tokens):
    new = init_adapters(params, jax.random.key(0), rank=2, targets=("*",))
    on = logits(with_adapters(params, new, SCALE), CONFIG, tokens)
    np.testing.assert_array_equal(on, logits(params, CONFIG, tokens))


def test_new_adapters_are_those_of_peft(params):
    """A uniform within 1 / sqrt(inputs) (kaiming-uniform with a = sqrt 5), B zero, in float32."""
    new = init_adapters(params, jax.random.key(0), rank=64, targets=EVERY)
    shapes = parameter_shapes(CONFIG)["layers"]
    assert set(new["layers"]) == set(EVERY)
    for name, adapter in new["layers"].items():
        layers, inputs, outputs = shapes[name]["kernel"]
        assert adapter["a"].shape == (layers, inputs, 64)
        assert adapter["b"].shape == (layers, 64, outputs)
        assert not adapter["b"].any()
        assert adapter["a"].dtype == adapter["b"].dtype == jnp.float32
        bound = inputs**-0.5
        assert 0.99 * bound < jnp.abs(adapter["a"]).max() <= bound
        np.testing.assert_allclose(adapter["a"].std(), bound / 3**0.5, rtol=0.05)


def test_one_matrix_draws_the_same_whatever_the_others(params):
    key = jax.random.key(5)
    few = init_adapters(params, key, rank=2, targets=("v", "q"))["layers"]
    many = init_adapters(params, key, rank=2, targets=EVERY)["layers"]
    np.testing.assert_array_equal(few["q"]["a"], many["q"]["a"])
    assert np.abs(many["k"]["a"] - many["v"]["a"]).max() > 0.01
    assert np.abs(many["q"]["a"][0] - many["q"]["a"][1]).max() > 0.01


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("q",), {"q"}),
        (("*",), set(EVERY)),
        (("?", "gat*"), {"q", "k", "v", "o", "gate"}),
        (("layers/down",), {"down"}),
    ],
)
def test_targets_are_names_patterns_or_paths(params, targets, names):
    assert set(init_adapters(params, jax.random.key(0), rank=1, targets=targets)["layers"]) == names


@pytest.mark.parametrize(
    ("rank", "targets", "message"),
    [
        (2, ("q", "query"), "lora.targets: 'query' names no matrix of the model; it has down, "),
        (2, (), "lora.targets: empty"),
        (0, ("q",), "lora.rank: 0"),
    ],
)
def test_what_cannot_be_adapted_is_said_in_one_line(params, rank, targets, message):
    with pytest.raises(UserError, match=message) as caught:
        init_adapters(params, jax.random.key(0), rank=rank, targets=targets)
    assert "\n" not in str(caught.value)


def test_trees_of_encoder_decoders():
    def stack(*names):
        return {"layers": {name: {"kernel": jnp.zeros((2, 4, 6))} for name in names}}

    params = {
        "embed": {"embedding": jnp.zeros((5, 4))},
        "unembed": {"kernel": jnp.zeros((4, 5))},
        "encoder": stack("q", "up"),
        "decoder": stack("q", "cross_q") | {"final_norm": {"scale": jnp.ones(4)}},
    }
    assert set(matrix_shapes(params)) == {
        "encoder/layers/q",
        "encoder/layers/up",
        "decoder/layers/q",
        "decoder/layers/cross_q",
    }
    adapters = init_adapters(params, jax.random.key(0), rank=3, targets=("q", "decoder/*"))
    assert set(items(adapters)) == {
        "encoder/layers/q",
        "decoder/layers/q",
        "decoder/layers/cross_q",
    }
    ones = jax.tree.map(jnp.ones_like, adapters)
    merged = merge(params, ones, 2.0)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_array_equal(merged["decoder"]["layers"]["cross_q"]["kernel"], 6.0)
    assert merged["encoder"]["layers"]["up"] == params["encoder"]["layers"]["up"]
    assert count(adapters) == 3 * 2 * 3 * (4 + 6)


def test_merged_model_is_the_model_with_adapters_on(params, adapters, tokens):
    on = logits(with_adapters(params, adapters, SCALE), CONFIG, tokens)
    merged = logits(merge(params, adapters, SCALE), CONFIG, tokens)
    np.testing.assert_allclose(on, merged, atol=2e-5)
    assert np.abs(on - logits(params, CONFIG, tokens)).max() > 0.05


def test_merging_is_written_out(params, adapters):
    merged = merge(params, adapters, SCALE)["layers"]["down"]["kernel"]
    a, b = (np.asarray(adapters["layers"]["down"][x], np.float64) for x in "ab")
    expected = np.asarray(params["layers"]["down"]["kernel"], np.float64) + SCALE * (a @ b)
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-7)


def test_stacked_adapters_are_both_merged(params, adapters):
    other = jax.tree.map(lambda x: 0.5 - x, init_adapters(params, jax.random.key(9), **RANK_TWO))
    stacked = stack(adapters, other)
    assert stacked["layers"]["q"]["a"].shape[-1] == 3 + 2
    one_by_one = merge(merge(params, adapters, SCALE), other, SCALE)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)  # noqa: E731
    jax.tree.map(close, merge(params, stacked, SCALE), one_by_one)


def test_merging_keeps_the_kernel_dtype_and_rounds_once(params, adapters):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    merged = merge(half, adapters, SCALE)["layers"]["q"]["kernel"]
    exact = merge(jax.tree.map(lambda x: x.astype(jnp.float32), half), adapters, SCALE)
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, exact["layers"]["q"]["kernel"].astype(jnp.bfloat16))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_are_those_through_the_merged_matrices(params, adapters, tokens, remat):
    """With G the gradient of W: that of A is s G B^T, that of B is s A^T G."""

    def value(params, adapters, scale):
        adapted = with_adapters(params, adapters, scale)
        return jnp.sin(hidden_states(adapted, CONFIG, tokens, compute=Compute(remat=remat))).sum()

    grads = jax.grad(value, argnums=1)(params, adapters, SCALE)
    by_kernel = jax.grad(value)(merge(params, adapters, SCALE), {}, 1.0)
    for name, adapter in adapters["layers"].items():
        g = by_kernel["layers"][name]["kernel"]
        a = SCALE * jnp.einsum("lio,lro->lir", g, adapter["b"])
        b = SCALE * jnp.einsum("lir,lio->lro", adapter["a"], g)
        np.testing.assert_allclose(grads["layers"][name]["a"], a, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(grads["layers"][name]["b"], b, rtol=1e-3, atol=1e-4)


def test_dropped_inputs_reach_the_adapter_alone(rng):
    """The update is s times x with zeros and doubled elements, for A B = 1."""
    x = jnp.asarray(rng.normal(size=(50, 8)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)
    eye = {"layers": {"q": {"a": jnp.eye(8)[None], "b": jnp.eye(8)[None]}}}
    dropped = with_dropout(eye, jax.random.key(0), rate=0.5)["layers"]["q"]
    one = with_adapters({"kernel": kernel}, {name: leaf[0] for name, leaf in dropped.items()}, 3.0)
    update = (dense(x, one) - dense(x, {"kernel": kernel})) / 3.0
    kept = np.abs(update) > 1e-4
    np.testing.assert_allclose(update, np.where(kept, 2 * x, 0), atol=1e-4)
    assert 0.4 < kept.mean() < 0.6
    assert len({tuple(row) for row in kept}) > 40  # every token has its own mask


def test_dropout_is_the_adapter_in_expectation(rng):
    x = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    a, b = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((1, 6, 2), (1, 2, 5)))
    flat = {"kernel": jnp.zeros((6, 5))}

    @jax.jit
    @jax.vmap
    def draw(key):
        adapters = with_dropout({"layers": {"q": {"a": a, "b": b}}}, key, rate=0.3)
        one = {k: v[0] for k, v in adapters["layers"]["q"].items()}
        return dense(x, with_adapters(flat, one, 1.0))

    draws = draw(jax.random.split(jax.random.key(1), 20_000))
    error = draws.std(0) / 20_000**0.5
    np.testing.assert_array_less(np.abs(draws.mean(0) - x @ a[0] @ b[0]), 5 * error)
    variance = 0.3 / 0.7 * jnp.square(x) @ jnp.square(a[0] @ b[0])
    np.testing.assert_allclose(draws.var(0), variance, rtol=0.05)


def test_layers_and_matrices_drop_apart(adapters):
    keys = [
        jax.random.key_data(adapter["dropout_key"])
        for adapter in items(with_dropout(adapters, jax.random.key(4), rate=0.1)).values()
    ]
    drawn = np.concatenate(keys)
    assert len(np.unique(drawn, axis=0)) == len(EVERY) * CONFIG.layers


def test_no_dropout_is_no_change(adapters):
    assert jax.tree.structure(with_dropout(adapters, jax.random.key(0), rate=0.0)) == (
        jax.tree.structure(adapters)
    )
    for rate in (-0.1, 1.0):
        with pytest.raises(UserError, match=r"lora\.dropout"):
            with_dropout(adapters, jax.random.key(0), rate=rate)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_dropout_through_the_log_probs(params, adapters, tokens, remat):
    """The same key drops the same; the backward pass of remat draws the masks of the forward."""
    rows = ResponseRows(
        tokens=tokens,
        prompt_length=jnp.full(2, 4),
        response_tokens=tokens[:, 4:],
        response_length=jnp.full(2, 5),
    )

    @partial(jax.jit, static_argnames="remat")
    @partial(jax.value_and_grad, argnums=0)
    def value(adapters, key, remat):
        policy = with_adapters(params, with_dropout(adapters, key, rate=0.4), SCALE)
        out = response_log_probs(policy, CONFIG, rows, compute=Compute(remat=remat))
        return out.log_prob.sum()

    here = value(adapters, jax.random.key(0), remat)
    again = value(adapters, jax.random.key(0), "none")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), here, again)
    assert jnp.abs(here[0] - value(adapters, jax.random.key(1), remat)[0]) > 1e-3
