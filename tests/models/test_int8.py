"""Products with int8 matrices against float64, and what XLA makes of them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import decoder, int8, layers
from tests.generation.test_generate import CONFIG


def floats(matrix):
    """The matrix, [inputs, outputs], that the integers and scales stand for."""
    integers = np.concatenate([np.asarray(part, np.float64) for part in matrix.parts])
    return integers.T * np.asarray(matrix.scale, np.float64)


def test_weights_are_rounded_to_the_nearest_of_255_values_of_their_output(rng):
    kernel = rng.normal(size=(64, 48)) * np.geomspace(1e-3, 10, 48)
    kernel[:, 5] = 0
    matrix = int8.quantise(jnp.asarray(kernel, jnp.float32))
    integers = np.concatenate([np.asarray(part) for part in matrix.parts])
    assert set(np.abs(integers).max(axis=1)) == {0, 127}  # 0: the output without weights
    error = np.abs(floats(matrix) - kernel)
    assert (error <= np.asarray(matrix.scale) / 2 * (1 + 1e-4)).all()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_products_are_those_of_float64_up_to_the_rounding_of_inputs(rng, rows, parts, monkeypatch):
    monkeypatch.setattr(int8.os, "cpu_count", lambda: parts)
    monkeypatch.setattr(int8, "PART", 64)
    matrix = int8.quantise(jnp.asarray(rng.normal(size=(96, 50)), jnp.float32))
    assert len(matrix.parts) == parts
    x = rng.normal(size=(rows, 96)) * np.geomspace(1e-6, 1e6, rows)[:, None]
    x[:, 7] *= 50  # an outlier, which makes the other inputs small integers
    found = int8.product(jnp.asarray(x, jnp.float32), matrix)
    most = np.abs(x).max(axis=1, keepdims=True) / 127 / 508
    bound = most * np.abs(floats(matrix)).sum(axis=0)
    expected = x @ floats(matrix)
    assert (np.abs(found - expected) <= bound * 1.01 + 1e-6 * np.abs(expected)).all()


def test_a_row_of_zeros_stays_one_and_inputs_keep_their_dtype(rng):
    matrix = int8.quantise(jnp.asarray(rng.normal(size=(8, 4)), jnp.float32))
    found = int8.product(jnp.zeros((2, 3, 8), jnp.bfloat16), matrix)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, np.zeros((2, 3, 4)))


def test_accelerators_multiply_floats(rng, monkeypatch):
    matrix = int8.quantise(jnp.asarray(rng.normal(size=(96, 50)), jnp.float32))
    monkeypatch.setattr(int8.devices, "platform", lambda: "gpu")
    x = rng.normal(size=(3, 96))
    found = int8.product(jnp.asarray(x, jnp.float32), matrix)
    np.testing.assert_allclose(found, x @ floats(matrix), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 16])
def test_the_compiled_product_multiplies_integers_and_converts_no_matrix(rng, rows):
    matrix = int8.quantise(jnp.asarray(rng.normal(size=(256, 512)), jnp.float32))
    text = jax.jit(int8.product).lower(jnp.ones((rows, 256)), matrix).compile().as_text()
    assert re.search(r"= s32\[\d+,\d+\]\S* dot\(", text)
    assert not re.search(r"= \w+\[(512,256|256,512)\]\S* (convert|copy|transpose)\(", text)


def test_a_decoder_of_integers_is_the_decoder_of_the_floats_they_stand_for():
    params = decoder.init_params(CONFIG, jax.random.key(0))
    rounded = int8.with_int8_kernels(params["layers"])
    meant = jax.tree.map(
        lambda leaf: (
            jnp.swapaxes(
                jnp.concatenate(leaf.parts, axis=-2) * leaf.scale[..., None].astype(jnp.float32),
                -1,
                -2,
            )
            if isinstance(leaf, int8.Int8Matrix)
            else leaf
        ),
        rounded,
        is_leaf=lambda leaf: isinstance(leaf, int8.Int8Matrix),
    )
    assert jax.tree.structure(meant) == jax.tree.structure(params["layers"])
    tokens = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]])
    found, expected = (
        decoder.logits({**params, "layers": own}, CONFIG, tokens) for own in (rounded, meant)
    )
    np.testing.assert_allclose(found, expected, atol=1e-3 * float(jnp.abs(expected).max()))


def test_adapters_beside_an_int8_kernel_stay_in_float(rng):
    kernel = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    adapter = {"a": jnp.ones((6, 2)), "b": jnp.ones((2, 4)), "scale": jnp.float32(0.5)}
    params = {"kernel": kernel, "adapter": adapter}
    rounded = int8.with_int8_kernels(params)
    x = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    update = layers.dense(x, params) - layers.dense(x, {"kernel": kernel})
    found = layers.dense(x, rounded) - layers.dense(x, {"kernel": rounded["kernel"]})
    np.testing.assert_allclose(found, update, atol=1e-5)
