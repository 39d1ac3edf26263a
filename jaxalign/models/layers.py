"""The layers of the shared models: dense, norms, activations; all pure functions."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign.models import devices, int8
from jaxalign.models.config import ClampedSwiGLU, ModelConfig
from jaxalign.models.int8 import Int8Matrix
from jaxalign.models.probes import matmul, spread

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def dense(x: Float[Array, "... inputs"], params: Mapping[str, Any]) -> Float[Array, "... outputs"]:
    r"""The one matrix product of all models: computed in the dtype of `x`.

    .. math:: y = x W + b + s \, x A B

    Args:
      x: inputs, [..., inputs].
      params: {"kernel": [inputs, outputs], "bias"?: [outputs], "adapter"?} in any float dtype, or
        the kernel as an `Int8Matrix` or a `QuantisedMatrix`; with a "probe", the gradients of
        kernel and bias are watched (`probes`). The adapter (`lora.with_adapters`) is {"a":
        [inputs, rank], "b": [rank, outputs], "scale": s}; with "dropout_key" and "dropout_rate" its
        input is dropped (`lora.with_dropout`), with a "probe" it is watched.

    Returns:
      [..., outputs] in the dtype of `x`.
    """
    probe, kernel = params.get("probe"), params["kernel"]
    y = int8.product(x, kernel) if isinstance(kernel, Int8Matrix) else matmul(x, kernel, probe)
    if "bias" in params:
        y = y + spread(params["bias"], y.shape, x.dtype, probe)
    if "adapter" in params:
        adapter = params["adapter"]
        if "dropout_key" in adapter:
            x = dropout(x, adapter["dropout_key"], adapter["dropout_rate"])
        probe = adapter.get("probe")
        update = matmul(matmul(x, adapter["a"], probe), adapter["b"], probe)
        y = y + update * jnp.asarray(adapter["scale"], x.dtype)
    return y


def mlp_branch(
    x: Float[Array, "... width"], layer: Mapping[str, Any], config: ModelConfig
) -> Float[Array, "... width"]:
    """What a layer's MLP adds to the residual stream."""
    up = dense(x, layer["up"])
    gate = dense(x, layer["gate"]) if config.gated else None
    return dense(activated(ACTIVATIONS[config.activation], up, gate), layer["down"])


def activated(activation: Callable[[Array], Array], up: Array, gate: Array | None) -> Array:
    """The activation of `up`, or `up` times that of the gate; 16 bits are rounded once, at the end.

    The backward pass recomputes it from what it reads, so that nothing is kept in float32.
    """

    def plain(up: Array, gate: Array | None) -> Array:
        return activation(up) if gate is None else activation(gate) * up

    return _in_float32(plain, up, gate)


def clamped_swiglu(form: ClampedSwiGLU, up: Array, gate: Array) -> Array:
    """`up` times the gate in a clamped form, computed as in `activated`."""

    def plain(up: Array, gate: Array) -> Array:
        gate = jnp.minimum(gate, form.limit)
        up = jnp.clip(up, -form.limit, form.limit)
        return (up + 1) * gate * jax.nn.sigmoid(form.alpha * gate)

    return _in_float32(plain, up, gate)


def _in_float32(plain: Callable[..., Array], up: Array, gate: Array | None) -> Array:
    """The function of both, in float32 where they have 16 bits, and recomputed."""
    if up.dtype.itemsize > 2:
        return plain(up, gate)
    wide = jax.checkpoint(
        lambda *xs: plain(*jax.tree.map(lambda x: x.astype(jnp.float32), xs)).astype(up.dtype),
        prevent_cse=False,
    )
    return wide(up, gate)


def look_up(
    params: Mapping[str, Any], ids: Int[Array, "rows length"], dtype: Any
) -> Float[Array, "rows length width"]:
    """Rows of {"embedding": [ids, width]}; a "lookup", [rows, length, width] of zeros, is added.

    Its cotangent is that of every row read, which is how embeddings are watched (`probes`).
    """
    table = devices.as_table(params["embedding"])
    x = devices.by_rows(jnp.take(table, ids, axis=0).astype(dtype))
    return x + params["lookup"].astype(dtype) if "lookup" in params else x


def dropout(
    x: Float[Array, "... width"], key: Array, rate: float | Float[Array, ""]
) -> Float[Array, "... width"]:
    """Each element is 0 with probability `rate`, else divided by 1 - rate."""
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    return jnp.where(jax.random.bernoulli(key, keep, x.shape), x / keep.astype(x.dtype), 0)


def rms_norm(
    x: Float[Array, "... width"],
    params: Mapping[str, Any],
    *,
    eps: float,
    offset: float = 0.0,
) -> Float[Array, "... width"]:
    """Root-mean-square norm over the last axis, in float32; `offset` is added to the scale.

    `params` is {"scale": [width]}; with a "probe" it is watched.
    """
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    scale = spread(params["scale"], y.shape, jnp.float32, params.get("probe"))
    return (y * (scale + offset)).astype(x.dtype)


def layer_norm(
    x: Float[Array, "... width"], params: Mapping[str, Any], *, eps: float
) -> Float[Array, "... width"]:
    """Layer norm over the last axis, in float32; {"scale": [width], "bias"?, "probe"?}."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    probe = params.get("probe")
    y = y * spread(params["scale"], y.shape, jnp.float32, probe)
    if "bias" in params:
        y = y + spread(params["bias"], y.shape, jnp.float32, probe)
    return y.astype(x.dtype)


def softmax(
    scores: Float[Array, "... keys"], sinks: Float[Array, "... one"] | None
) -> Float[Array, "... keys"]:
    r"""Softmax over the last axis, with a score of its own for attending to no key.

    .. math:: \frac{e^{z_s}}{e^{b} + \sum_{s'} e^{z_{s'}}}

    Args:
      scores: z.
      sinks: b, with a last axis of 1; None: there is none.
    """
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    top = jnp.maximum(scores.max(-1, keepdims=True), sinks)
    top = jax.lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    return weights / (weights.sum(-1, keepdims=True) + jnp.exp(sinks - top))


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """`cap * tanh(x / cap)`; None leaves x as it is."""
    return x if cap is None else cap * jnp.tanh(x / cap)
