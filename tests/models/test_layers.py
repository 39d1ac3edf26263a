"""Norms, dense and caps against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.layers import dense, layer_norm, rms_norm, softcap


def draw(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def test_dense_multiplies_adds_and_adapts(rng):
    x, kernel, bias = draw(rng, 2, 3, 4), draw(rng, 4, 5), draw(rng, 5)
    a, b = draw(rng, 4, 2), draw(rng, 2, 5)
    adapter = {"a": a, "b": b, "scale": 0.5}
    out = dense(x, {"kernel": kernel, "bias": bias, "adapter": adapter})
    x_, kernel_, bias_, a_, b_ = (np.asarray(y, np.float64) for y in (x, kernel, bias, a, b))
    np.testing.assert_allclose(out, x_ @ kernel_ + bias_ + 0.5 * (x_ @ a_ @ b_), atol=1e-5)
    assert dense(x.astype(jnp.bfloat16), {"kernel": kernel}).dtype == jnp.bfloat16


def test_norms_are_numpys(rng):
    x, scale, bias = draw(rng, 2, 3, 16), draw(rng, 16), draw(rng, 16)
    n, w, b = (np.asarray(y, np.float64) for y in (x, scale, bias))
    expected = n / np.sqrt((n**2).mean(-1, keepdims=True) + 0.1) * (w + 1)
    np.testing.assert_allclose(
        rms_norm(x, {"scale": scale}, eps=0.1, offset=1.0), expected, atol=1e-5
    )
    centred = n - n.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 0.1) * w + b
    np.testing.assert_allclose(
        layer_norm(x, {"scale": scale, "bias": bias}, eps=0.1), expected, atol=1e-5
    )


def test_norms_are_computed_in_float32(rng):
    x = 100 + draw(rng, 1, 1, 256).astype(jnp.bfloat16)
    ones = jnp.ones(256)
    exact = layer_norm(x.astype(jnp.float32), {"scale": ones}, eps=1e-6)
    rough = layer_norm(x, {"scale": ones}, eps=1e-6)
    np.testing.assert_allclose(rough.astype(jnp.float32), exact, atol=0.02)


def test_softcap_bounds_and_keeps_small_values():
    x = jnp.asarray([-1e4, -0.01, 0.0, 0.01, 1e4])
    np.testing.assert_allclose(softcap(x, 3.0), [-3, -0.01, 0, 0.01, 3], atol=1e-6)
    assert softcap(x, None) is x


def test_float32_asks_for_full_precision(rng):
    jaxpr = str(
        jax.make_jaxpr(functools.partial(dense, params={"kernel": draw(rng, 4, 4)}))(
            draw(rng, 2, 4)
        )
    )
    assert "HIGHEST" in jaxpr
