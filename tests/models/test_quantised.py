"""Quantised matrices: published values, errors in closed form, another library, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxalign.errors import UserError
from jaxalign.models import devices, products
from jaxalign.models.differentiation import forward_mode
from jaxalign.models.quantised import (
    NF4,
    QuantisedMatrix,
    block_size,
    dequantise,
    in_fewer_bits,
    quantise,
)

LAYERS, INPUTS, OUTPUTS = 2, 128, 24


@pytest.fixture(scope="module")
def kernels():
    """Normal, with a block of zeros and blocks of very different sizes."""
    drawn = np.random.default_rng(0)
    made = drawn.normal(size=(LAYERS, INPUTS, OUTPUTS)) * 10.0 ** drawn.uniform(-6, 3, OUTPUTS)
    made[0, :64, 3] = 0
    return np.asarray(made, np.float32)


def blocks_of(x):
    return np.asarray(x, np.float64).reshape(LAYERS, INPUTS // 64, 64, -1)


def test_the_16_values_are_quantiles_of_a_normal_distribution():
    """This is how bitsandbytes makes its table; QLoRA prints the same one in appendix E."""
    offset = 0.9677083
    above = stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    expected = np.sort([*above, 0.0, *below])
    np.testing.assert_allclose(NF4, expected / expected.max(), atol=3e-7)


def relative_errors(kernels, matrix, largest):
    """Errors and weights, both divided by the scale of their block."""
    scale = np.abs(blocks_of(kernels)).max(2, keepdims=True) / largest
    scale = np.where(scale > 0, scale, 1)
    exact, found = blocks_of(kernels) / scale, blocks_of(dequantise(matrix)) / scale
    return np.abs(found - exact), exact


def test_int8_is_off_by_half_a_step(kernels):
    matrix = quantise(kernels, "int8")
    assert matrix.codes.dtype == jnp.int8
    assert matrix.codes.shape == kernels.shape
    errors, exact = relative_errors(kernels, matrix, 127)
    np.testing.assert_allclose(errors, np.abs(exact - np.round(exact)), atol=1e-4)
    assert 0.49 < errors.max() < 0.5001
    assert jnp.abs(matrix.codes).max() == 127


def test_nf4_is_the_nearest_of_16_values(kernels):
    matrix = quantise(kernels, "nf4")
    assert matrix.codes.dtype == jnp.uint8
    assert matrix.codes.shape == (LAYERS, INPUTS // 2, OUTPUTS)
    errors, exact = relative_errors(kernels, matrix, 1)
    nearest = np.abs(exact[..., None] - np.array(NF4)).min(-1)
    np.testing.assert_allclose(errors, nearest, atol=1e-6)
    assert 0.14 < errors.max() < 0.152  # half of the widest gap, from -1 to -0.696


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantising_twice_changes_nothing_and_zeros_stay(kernels, kind):
    matrix = quantise(kernels, kind)
    known = dequantise(matrix)
    assert not known[0, :64, 3].any()
    again = quantise(known, kind)
    np.testing.assert_array_equal(again.codes, matrix.codes)
    one = QuantisedMatrix(codes=matrix.codes[1], scale=matrix.scale[1], kind=kind)
    np.testing.assert_array_equal(dequantise(one), known[1])
    np.testing.assert_array_equal(dequantise(one, jnp.bfloat16), known[1].astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_another_library_reads_the_same_weights(kernels, kind):
    qwix = pytest.importorskip("qwix")
    matrix = quantise(kernels, kind)
    codes = matrix.codes
    if kind == "nf4":
        codes = jnp.stack([codes & 15, codes >> 4], axis=2).reshape(kernels.shape)
        codes = codes.astype(jnp.uint4)
    qtype = "nf4" if kind == "nf4" else jnp.int8
    theirs = qwix.dequantize(qwix.QArray(codes, matrix.scale, None, qtype))
    np.testing.assert_array_equal(theirs, dequantise(matrix))
    options = {"channelwise_axes": (0, 2), "tiled_axes": {1: 64}}
    own = qwix.quantize(jnp.asarray(kernels), qtype, **options)
    if kind == "nf4":
        np.testing.assert_array_equal(own.qvalue, codes)
        np.testing.assert_array_equal(own.scale, matrix.scale)
    else:  # its largest code is 127.5, cut
        both = (np.abs(x - kernels).mean((0, 1)) for x in (qwix.dequantize(own), theirs))
        assert np.mean(next(both) / next(both)) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("size", [(6, 6), (64, 64), (96, 48), (130, 26), (4096, 64)])
def test_blocks_divide_the_inputs(size):
    inputs, expected = size
    assert block_size(inputs) == expected


def test_an_odd_number_of_inputs_has_no_4_bits():
    odd = jnp.ones((1, 7, 4))
    with pytest.raises(
        UserError, match=r"lora.weights: nf4 stores inputs in pairs, .* 7; set int8"
    ):
        quantise(odd, "nf4")
    np.testing.assert_allclose(dequantise(quantise(odd, "int8")), odd, rtol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("count", [1, 8], ids=["one CPU", "several"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_those_of_the_dequantised_matrix(kernels, rng, kind, count, dtype):
    matrix = jax.tree.map(lambda x: x[1], quantise(kernels, kind))
    x = jnp.asarray(rng.normal(size=(5, INPUTS)), dtype)
    dy = jnp.asarray(rng.normal(size=(5, OUTPUTS)), dtype)

    def both(kernel):
        y, backward = jax.vjp(lambda x: products.product(x, kernel), x)
        return y, backward(dy)[0]

    with devices.compiling_for("cpu", count):
        found, expected = both(matrix), both(dequantise(matrix))
        with forward_mode():
            direction = jax.jvp(lambda x: products.product(x, matrix), (x,), (x,))
    tolerance = 1e-6 if dtype == "float32" else 1e-2
    for own, other in zip((*found, direction[1]), (*expected, expected[0]), strict=True):
        assert own.dtype == other.dtype == dtype
        a, b = (np.asarray(x, np.float64) for x in (own, other))
        assert (np.abs(a - b) <= tolerance * np.abs(b).max(0, keepdims=True)).all()


def test_a_tree_keeps_norms_and_embeddings():
    params = {
        "embed": {"embedding": jnp.ones((5, 4))},
        "layers": {"q": {"kernel": jnp.ones((1, 4, 6)), "bias": jnp.ones((1, 6))}},
        "final_norm": {"scale": jnp.ones(4)},
    }
    for dtype in (jnp.float32, jnp.bfloat16):
        small = in_fewer_bits(params, "nf4", dtype)
        assert isinstance(small["layers"]["q"]["kernel"], QuantisedMatrix)
        assert small["embed"]["embedding"].dtype == dtype
        assert small["final_norm"]["scale"] is params["final_norm"]["scale"]
        assert small["layers"]["q"]["bias"].dtype == jnp.float32
        shapes = in_fewer_bits(jax.eval_shape(lambda: params), "nf4", dtype)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), small) == jax.tree.map(
            lambda x: (x.shape, x.dtype), shapes
        )
    half = in_fewer_bits(params, "bfloat16", jnp.float32)
    assert half["layers"]["q"]["kernel"].dtype == half["embed"]["embedding"].dtype == jnp.bfloat16
