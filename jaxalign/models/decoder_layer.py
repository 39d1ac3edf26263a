"""One layer of a decoder: norms, attention and MLP around the residual stream."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.models.attention import attention
from jaxalign.models.config import DecoderConfig
from jaxalign.models.experts import experts_branch
from jaxalign.models.layers import dense, layer_norm, mlp_branch, rms_norm
from jaxalign.models.probes import spread
from jaxalign.models.rope import rope_angles, rotate

Rotations = list[tuple[Array, Array]]
"""Cosines and sines for each kind of rotation: of all layers, of sliding-window layers."""


class LayerKind(NamedTuple):
    """In what a layer differs from others of its decoder.

    Attributes:
      is_windowed: whether it sees a window.
      is_rotated: whether it has rotary positions.
    """

    is_windowed: bool | Bool[Array, ""]
    is_rotated: bool | Bool[Array, ""]


def layer_kinds(config: DecoderConfig) -> list[LayerKind]:
    """The kind of every layer."""
    none = (False,) * config.layers
    both = zip(config.windowed or none, config.unrotated or none, strict=True)
    return [LayerKind(windowed, not unrotated) for windowed, unrotated in both]


def norm(x: jax.Array, params: Mapping[str, Any], config: DecoderConfig) -> jax.Array:
    """The config's norm over the last axis."""
    if config.norm == "layer":
        return layer_norm(x, params, eps=config.norm_eps)
    return rms_norm(x, params, eps=config.norm_eps, offset=config.norm_offset)


def queries_keys_values(
    x: Float[Array, "batch length width"],
    layer: Mapping[str, Any],
    config: DecoderConfig,
    *,
    kind: LayerKind,
    angles: Rotations | None,
) -> tuple[Array, Array, Array]:
    """A layer's queries, keys and values, normed and rotated, [batch, length, heads, head_width].

    Args:
      x: what the layer's attention reads.
      layer: its parameters.
      config: the decoder.
      kind: of the layer; the rotation of sliding-window layers may be one of their own.
      angles: from `rotations`; None: no rotation.
    """
    batch, length, _ = x.shape

    def project(name: str, heads: int) -> jax.Array:
        y = dense(x, layer[name])
        own = layer.get(f"{name}_norm")
        if own is not None and config.qk_norm == "width":
            y = norm(y, own, config)
        y = y.reshape(batch, length, heads, config.head_width)
        return norm(y, own, config) if own is not None and config.qk_norm == "head" else y

    q = project("q", config.heads)
    k, v = project("k", config.kv_heads), project("v", config.kv_heads)
    if angles is not None:
        cosines, sines = angles[0]
        if config.local_rope is not None:
            cosines, sines = (
                jnp.where(kind.is_windowed, local, full)
                for local, full in zip(angles[1], angles[0], strict=True)
            )
        if any(config.unrotated):  # turned by an angle of 0
            cosines = jnp.where(kind.is_rotated, cosines, 1.0)
            sines = jnp.where(kind.is_rotated, sines, 0.0)
        turn = functools.partial(rotate, interleaved=config.rope.interleaved)
        q, k = turn(q, cosines, sines), turn(k, cosines, sines)
    return q, k, v


def attention_branch(
    x: Float[Array, "batch length width"],
    layer: Mapping[str, Any],
    config: DecoderConfig,
    *,
    kind: LayerKind,
    angles: Rotations | None,
    visible: Mapping[str, Any],
    implementation: str,
) -> tuple[Float[Array, "batch length width"], tuple[Array, Array]]:
    """What attention adds to the residual stream, and the keys and values that it read.

    Args:
      x: what the attention reads.
      layer: its parameters.
      config: the decoder.
      kind: as in `queries_keys_values`.
      angles: as in `queries_keys_values`.
      visible: `segment_ids`, `prefix_ids` and `positions` of `attention`.
      implementation: as in `attention`.
    """
    q, k, v = queries_keys_values(x, layer, config, kind=kind, angles=angles)
    attend = functools.partial(
        attention,
        scale=config.scale,
        **visible,
        cap=config.attention_softcap,
        implementation=implementation,
    )
    arrays = {"q": q, "k": k, "v": v, "sinks": _sinks(layer, q)}

    def narrow(arrays: Mapping[str, Any]) -> Array:
        return attend(**arrays, window=config.window)

    def whole(arrays: Mapping[str, Any]) -> Array:
        return attend(**arrays)

    if config.windowed and all(config.windowed):
        mixed = narrow(arrays)
    elif any(config.windowed):
        mixed = jax.lax.cond(kind.is_windowed, narrow, whole, arrays)
    else:
        mixed = whole(arrays)
    mixed = mixed.reshape(*x.shape[:2], -1)
    return dense(mixed, layer["o"]), (k, v)


def _sinks(
    layer: Mapping[str, Any], q: Float[Array, "batch length heads head_width"]
) -> Float[Array, "batch length heads"] | None:
    """Each query's score of attending to no key, in float32; None: the layer has none."""
    if "sinks" not in layer:
        return None
    params = layer["sinks"]
    return spread(params["logits"], q.shape[:3], jnp.float32, params.get("probe"))


def feed_forward(
    x: Float[Array, "rows length width"],
    layer: Mapping[str, Any],
    config: DecoderConfig,
    *,
    real: Bool[Array, "rows length"] | None = None,
) -> Float[Array, "rows length width"]:
    """What a layer's MLP, or its experts, add to the residual stream.

    Args:
      x: what the MLP reads.
      layer: its parameters.
      config: the decoder.
      real: the tokens that count in the experts' statistics; None: all.
    """
    if config.experts is None:
        return mlp_branch(x, layer, config)
    return experts_branch(x, layer, config, real=real)


def one_layer(
    x: Float[Array, "... width"],
    layer: Mapping[str, Any],
    config: DecoderConfig,
    *,
    attend: Callable[[Array], tuple[Array, Any]],
    mlp: Callable[[Array], Array],
) -> tuple[Float[Array, "... width"], Any]:
    """One layer: the two branches, with norms where the config puts them, and its steering.

    Args:
      x: the residual stream.
      layer: its parameters.
      config: the decoder.
      attend: the attention branch, and whatever it keeps.
      mlp: the MLP branch.

    Returns:
      The residual stream after the layer, and what `attend` keeps.
    """

    def before(name, y):
        return y if config.norm_placement == "post" else norm(y, layer[name], config)

    def after(name, y):
        placed = config.norm_placement in ("post", "sandwich")
        y = norm(y, layer[name], config) if placed else y
        scale = config.residual_scale
        return y if scale is None else y * jnp.asarray(scale, y.dtype)

    entered = before("attention_norm", x)
    attended, kept = attend(entered)
    attended = after("post_attention_norm", attended)
    if config.norm_placement in ("parallel", "shared"):
        shared = config.norm_placement == "shared"
        entered = entered if shared else before("mlp_norm", x)
        x = x + attended + after("post_mlp_norm", mlp(entered))
    else:
        x = x + attended
        x = x + after("post_mlp_norm", mlp(before("mlp_norm", x)))
    if "steering" in layer:
        x = x + jnp.broadcast_to(layer["steering"].astype(x.dtype), x.shape)
    if "nulling" in layer:
        x = without_direction(x, layer["nulling"])
    return x, kept


def without_direction(
    x: Float[Array, "... width"], vector: Float[Array, " width"]
) -> Float[Array, "... width"]:
    r"""The residual stream without what it has along a vector; the opposite side is kept.

    .. math:: h - \frac{\max(h^\top v, 0)}{\lVert v \rVert^2} v

    Args:
      x: hidden states.
      vector: direction v; zero changes nothing.
    """
    v = vector.astype(x.dtype)
    square = jnp.sum(jnp.square(v))
    along = jnp.maximum(x @ v, 0.0) / jnp.where(square > 0, square, 1.0)
    return x - along[..., None] * jnp.broadcast_to(v, x.shape)


def rotations(config: DecoderConfig, positions: Int[Array, "batch length"]) -> Rotations | None:
    """Cosines and sines at each position for each kind of rotation; None: positions are learned."""
    if config.position_kind == "learned":
        return None
    ropes = [config.rope] if config.local_rope is None else [config.rope, config.local_rope]
    sizes = config.head_width, config.context_length
    return [rope_angles(rope, *sizes, positions) for rope in ropes]
