"""Products in each form: against float64, in the compiled program, and what is kept of them."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import devices, products
from jaxalign.models.compute import Compute
from jaxalign.models.config import DecoderConfig
from jaxalign.models.decoder import hidden_states, init_params, unembedding
from jaxalign.models.logprobs import token_log_probs

CONFIG = DecoderConfig(
    vocab_size=300,
    width=32,
    layers=2,
    heads=2,
    kv_heads=1,
    head_width=16,
    mlp_width=48,
    context_length=64,
    tied=True,
)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 24))
NUMBER = 3 * 7 + 3
"""Products of a gradient: 7 of a layer and one of the logits, each forward and twice backward."""
DOT = re.compile(r" = (\S+?)\[[\d,]*\]\S* dot\(%(\S+), %(\S+)\), (.*?), metadata")


@contextlib.contextmanager
def cpu(units):
    """Programs for a single CPU with or without bfloat16 units; the tests have several devices."""
    with devices.compiling_for("cpu", 1), devices.bfloat16_units(units):
        yield


@pytest.fixture(params=[True, False], ids=["units", "no units"])
def units(request):
    """Programs for a CPU with and without bfloat16 units."""
    with cpu(request.param):
        yield request.param


def rounded(rng, *shape):
    """Random numbers that bfloat16 represents."""
    return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)


def dots(function, *arguments) -> tuple[list[tuple], str]:
    """(dtypes of both operands and the result, contracted axes) of products of two matrices."""
    text = jax.jit(function).lower(*arguments).compile().as_text() or ""
    found = []
    for line in text.splitlines():
        dot = DOT.search(line)
        if dot is None or "batch_dims" in dot[4]:
            continue
        operands = (re.escape(name) for name in (dot[2], dot[3]))
        dtypes = [re.findall(rf"%{name} = (\w+)\[", text)[0] for name in operands]
        axes = re.findall(r"contracting_dims=\{(\d)\}", dot[4])
        found.append((*dtypes, dot[1], *map(int, axes)))
    return found, text


def loss(params, dtype, remat="none"):
    """A function of all parameters whose gradient has all products of a training step."""
    compute = Compute(dtype=dtype, remat=remat)
    tokens = jnp.asarray(TOKENS)
    hidden = hidden_states(params, CONFIG, tokens, compute=compute).reshape(-1, CONFIG.width)
    kernel, _ = unembedding(params, CONFIG)
    return token_log_probs(hidden, kernel, tokens.reshape(-1)).log_prob.sum()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_and_gradients_are_float64s(units, dtype, rng):
    x, dy = rounded(rng, 40, 24), rounded(rng, 40, 16)
    kernel = rounded(rng, 24, 16).astype(dtype)
    y, backward = jax.vjp(products.product, x, kernel)
    dx, d_kernel = backward(dy)
    x_, dy_, kernel_ = (np.asarray(a, np.float64) for a in (x, dy, kernel))
    assert (y.dtype, dx.dtype, d_kernel.dtype) == (jnp.bfloat16, jnp.bfloat16, dtype)
    for found, expected in ((y, x_ @ kernel_), (dx, dy_ @ kernel_.T), (d_kernel, x_.T @ dy_)):
        exact = 1e-5 if found.dtype == jnp.float32 else 2.0**-8  # half a unit in the last place
        scale = np.abs(expected) + 1e-3 * np.abs(expected).max()
        assert np.max(np.abs(np.asarray(found, np.float64) - expected) / scale) < exact


def test_float32_is_the_plain_product_in_either_case(units, rng):
    x, kernel = (jnp.asarray(rng.normal(size=(8, 8)), jnp.float32) for _ in range(2))
    plain = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    assert str(jax.make_jaxpr(products.product)(x, kernel)) == str(jax.make_jaxpr(plain)(x, kernel))


def test_several_devices_have_the_plain_product(rng):
    x, kernel = rounded(rng, 8, 8), rounded(rng, 8, 8)
    with devices.compiling_for("cpu", 8), devices.bfloat16_units(True):
        jaxpr = str(jax.make_jaxpr(products.product)(x, kernel))
    assert jaxpr == str(jax.make_jaxpr(jnp.matmul)(x, kernel))


def test_compiled_products_reach_the_units():
    """An upgrade of jaxlib may change the conditions of its fast path without a word."""
    params = init_params(CONFIG, jax.random.key(0))
    with cpu(True):
        found, text = dots(jax.grad(lambda p: loss(p, jnp.bfloat16)), params)
    assert len(found) == NUMBER
    assert {dot[:4] for dot in found} == {("bf16", "bf16", "f32", 1)}
    assert text.count('"kind":"__ynn_fusion"') >= len(found)


def test_a_single_row_reaches_the_units(rng):
    x, kernel = rounded(rng, 1, 24), rounded(rng, 24, 16)
    with cpu(True):
        found, _ = dots(products.product, x, kernel)
        y = products.product(x, kernel)
    assert [dot[:4] for dot in found] == [("bf16", "bf16", "f32", 1)]
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=0.01, atol=0.01)


def test_without_units_all_products_are_float32s():
    params = init_params(CONFIG, jax.random.key(0))
    with cpu(False):
        found, _ = dots(jax.grad(lambda p: loss(p, jnp.bfloat16)), params)
    assert len(found) == NUMBER
    assert {dot[:3] for dot in found} == {("f32", "f32", "f32")}


def test_gradients_agree_with_float32s(units):
    params = init_params(CONFIG, jax.random.key(0))
    exact, rough = (jax.grad(loss)(params, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    for found, expected in zip(jax.tree.leaves(rough), jax.tree.leaves(exact), strict=True):
        assert found.dtype == expected.dtype
        assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


def test_dots_keeps_products_and_recomputes_none(units):
    params = init_params(CONFIG, jax.random.key(0))

    def kept(dtype, remat):
        def leaves(p):
            return jax.tree.leaves(jax.vjp(lambda p: loss(p, dtype, remat), p)[1])

        return sum(x.size * x.dtype.itemsize for x in jax.eval_shape(leaves, params))

    def number(dtype, remat):
        text = jax.jit(jax.grad(lambda p: loss(p, dtype, remat))).lower(params).as_text()
        found = [line for line in text.splitlines() if "dot_general" in line]
        return sum("batching_dims" not in line for line in found)

    for dtype in (jnp.float32, jnp.bfloat16):
        assert number(dtype, "dots") == number(dtype, "none") < number(dtype, "full")
    outputs = sum(
        layer["kernel"].shape[0] * layer["kernel"].shape[2]
        for layer in params["layers"].values()
        if "kernel" in layer
    )
    saved = kept(jnp.float32, "dots") - kept(jnp.bfloat16, "dots")
    assert saved >= 2 * TOKENS.size * outputs


@pytest.mark.parametrize("remat", ["full", "dots", "attention"])
def test_no_stack_of_layers_is_converted(units, remat):
    """XLA would convert all layers of a stack of bfloat16 arrays whenever it writes one of them."""
    params = init_params(CONFIG, jax.random.key(0))
    text = jax.jit(jax.grad(lambda p: loss(p, jnp.bfloat16, remat))).lower(params).as_text()
    shapes = re.findall(r"dynamic_update_slice.* -> tensor<(\S+)>", text)
    assert any(shape.endswith("xui16") for shape in shapes)
    assert not any(shape.endswith("xbf16") for shape in shapes)


def test_flags_of_a_processor(tmp_path):
    for flags, expected in (("sse2 avx512_bf16 rdpid", True), ("amx_bf16", True), ("avx2", False)):
        file = tmp_path / f"{expected}{flags[0]}"
        file.write_text(f"processor : 0\nflags : fpu {flags}\n")
        assert devices._bfloat16_in(file) == expected
    assert not devices._bfloat16_in(tmp_path / "missing")
