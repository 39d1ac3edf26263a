"""The shared decoder: parameters as a nested dict, the forward pass as a pure function."""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.errors import UserError
from jaxalign.models import devices, int8
from jaxalign.models.compute import Compute
from jaxalign.models.config import DecoderConfig, ModelConfig
from jaxalign.models.decoder_layer import (
    LayerKind,
    attention_branch,
    feed_forward,
    layer_kinds,
    norm,
    one_layer,
    rotations,
)
from jaxalign.models.experts import expert_shapes
from jaxalign.models.int8 import Int8Matrix
from jaxalign.models.layers import look_up, softcap
from jaxalign.models.module import Model
from jaxalign.models.precision import multiply
from jaxalign.models.sequences import Sequences
from jaxalign.records import AnyArray, record, static


@record
class Layout:
    """Which tokens of a row see each other, and at which positions they stand.

    Rows padded on the right need none of it: causality hides the padding from every real token,
    and on a GPU the fused kernel is then used.

    Attributes:
      attention_mask: nonzero at real tokens; padding on either side.
      segment_ids: packed documents 1, 2, ...; 0 is padding. A token sees its own document alone.
      prefix_ids: the segment that a token's own segment continues, and that the token sees, too;
        needs `positions`.
      positions: by default counted from each row's first real token, or from the first token of
        each segment.
      real: the tokens that count in statistics of experts; None: those outside of the padding, as
        mask and segments say it.
      reach: no token sees one as many or more places before it in the row; None: unknown. Needs
        `prefix_ids`.
      sequences: the same as segments and prefixes say, for a GPU's fused kernel; None: unknown.
    """

    attention_mask: AnyArray | None = None
    segment_ids: Int[AnyArray, "rows length"] | None = None
    prefix_ids: Int[AnyArray, "rows length"] | None = None
    positions: Int[AnyArray, "rows length"] | None = None
    sequences: Sequences | None = None
    real: Bool[AnyArray, "rows length"] | None = None
    reach: int | None = static(None)


def parameter_shapes(config: DecoderConfig) -> dict[str, Any]:
    """The shape of every parameter, in the nested dict's own form."""
    width, heads = config.width, config.heads * config.head_width
    kv, bias = config.kv_heads * config.head_width, config.norm == "layer" and config.norm_bias

    def norms(*size: int) -> dict[str, tuple[int, ...]]:
        return {"scale": size, "bias": size} if bias else {"scale": size}

    def kernel(inputs: int, outputs: int, has_bias: bool) -> dict[str, tuple[int, ...]]:
        shapes = {"kernel": (config.layers, inputs, outputs)}
        return shapes | ({"bias": (config.layers, outputs)} if has_bias else {})

    layers: dict[str, Any] = {
        "q": kernel(width, heads, config.qkv_bias),
        "k": kernel(width, kv, config.qkv_bias),
        "v": kernel(width, kv, config.qkv_bias),
        "o": kernel(heads, width, config.output_bias),
    }
    if config.experts is not None:
        layers |= expert_shapes(config, config.experts)
    else:
        layers["up"] = kernel(width, config.mlp_width, config.mlp_bias)
        layers["down"] = kernel(config.mlp_width, width, config.mlp_bias)
        if config.gated:
            layers["gate"] = kernel(width, config.mlp_width, config.mlp_bias)
    if config.norm_placement != "post":
        layers["attention_norm"] = norms(config.layers, width)
    if config.norm_placement not in ("post", "shared"):
        layers["mlp_norm"] = norms(config.layers, width)
    if config.norm_placement in ("post", "sandwich"):
        names = ("post_attention_norm", "post_mlp_norm")
        layers |= {name: norms(config.layers, width) for name in names}
    if config.qk_norm is not None:
        sizes = (heads, kv) if config.qk_norm == "width" else (config.head_width,) * 2
        layers["q_norm"] = {"scale": (config.layers, sizes[0])}
        layers["k_norm"] = {"scale": (config.layers, sizes[1])}
    if config.sinks:
        layers["sinks"] = {"logits": (config.layers, config.heads)}
    shapes: dict[str, Any] = {
        "embed": {"embedding": (config.vocab_size, width)},
        "layers": layers,
        "final_norm": norms(width),
    }
    if config.position_kind == "learned":
        shapes["positions"] = {"embedding": (config.context_length, width)}
    if not config.tied:
        shapes["unembed"] = {"kernel": (width, config.vocab_size)}
    return shapes


def init_params(config: DecoderConfig, key: jax.Array, *, dtype: Any = jnp.float32) -> dict:
    """Random parameters: normal matrices, norms that do nothing, biases of zero.

    Matrices that write into the residual stream are scaled by (2 layers) ** -0.5 (GPT-2 paper,
    section 2.3).

    Args:
      config: the decoder.
      key: one PRNG key.
      dtype: of the parameters.

    Returns:
      The nested dict of arrays that `parameter_shapes` describes.
    """

    def leaf(path, shape):
        names = [entry.key for entry in path]
        if names[-1] == "bias":
            return jnp.zeros(shape, dtype)
        if names[-1] == "scale":
            return jnp.full(shape, 1.0 - config.norm_offset, dtype)
        scale = config.initializer_range
        if names[-2] in ("o", "down"):
            scale /= (2 * config.layers) ** 0.5
        # The leaf's name decides its key: adding a leaf changes no other.
        own = jax.random.fold_in(key, zlib.crc32("/".join(names).encode()))
        return (scale * jax.random.normal(own, shape, jnp.float32)).astype(dtype)

    shapes = parameter_shapes(config)
    return jax.tree_util.tree_map_with_path(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def with_steering(
    params: Mapping[str, Any], vectors: Float[Array, "layers *rows width"]
) -> dict[str, Any]:
    """A decoder's parameters with a vector per layer, added to the layer's output everywhere.

    Args:
      params: of the decoder.
      vectors: [layers, width], or a vector for each row, [layers, rows, 1, width].
    """
    return {**params, "layers": {**params["layers"], "steering": vectors}}


def with_nulling(
    params: Mapping[str, Any], vectors: Float[Array, "layers width"]
) -> dict[str, Any]:
    """A decoder's parameters with a direction per layer, which its output has no more of."""
    return {**params, "layers": {**params["layers"], "nulling": vectors}}


def embed(
    params: Mapping[str, Any],
    config: DecoderConfig,
    tokens: Int[Array, "batch length"],
    positions: Int[Array, "rows length"],
    dtype: Any,
) -> Float[Array, "batch length width"]:
    """What the first layer reads: embeddings, with positions where these are learned."""
    x = look_up(params["embed"], tokens, dtype)
    if config.embedding_scale is not None:
        x = x * jnp.asarray(config.embedding_scale, dtype)
    if config.position_kind == "learned":
        x = x + look_up(params["positions"], jnp.broadcast_to(positions, tokens.shape), dtype)
    return x


def _positions(length: int, layout: Layout) -> Int[Array, "rows length"]:
    """Positions count from the first real token of each row, or of each packed segment."""
    if layout.positions is not None:
        return layout.positions
    index = jnp.arange(length)[None, :]
    if layout.segment_ids is not None:
        segment_ids = layout.segment_ids
        before = jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
        starts = jnp.where(segment_ids != before, index, 0)
        return index - jax.lax.cummax(starts, axis=1)
    if layout.attention_mask is not None:
        leading = jnp.argmax(layout.attention_mask != 0, axis=1)[:, None]
        return jnp.maximum(index - leading, 0)
    return index


def begin_layers(
    params: Mapping[str, Any],
    config: DecoderConfig,
    tokens: Int[Array, "batch length"],
    layout: Layout | None = None,
    *,
    compute: Compute = Compute(),
) -> tuple[Float[Array, "batch length width"], Callable, tuple[Mapping[str, Any], LayerKind]]:
    """The parts of `hidden_states`, for callers that go through the layers themselves.

    Args:
      params: as in `hidden_states`.
      config: the decoder.
      tokens: as in `hidden_states`.
      layout: as in `hidden_states`.
      compute: as in `hidden_states`, without `remat`.

    Returns:
      What the first layer reads; a layer, (x, inputs) -> (x, (keys, values)); and the layers'
      inputs, stacked [layers, ...]: their parameters, and the kind of each.

    Raises:
      UserError: if the rows are longer than learned positions reach.
    """
    layout, length = layout or Layout(), tokens.shape[1]
    reaches = length > config.context_length and layout.prefix_ids is None
    if config.position_kind == "learned" and reaches:
        raise UserError(
            f"length: {length} tokens, but {config.family} has learned positions for "
            f"{config.context_length}; shorten the rows"
        )
    positions, segments = _positions(length, layout), layout.segment_ids
    if layout.attention_mask is not None:
        real = (layout.attention_mask != 0).astype(jnp.int32)
        segments = real if segments is None else segments * real
    visible: dict[str, Any] = {"segment_ids": segments}
    if layout.prefix_ids is not None:
        visible |= {"prefix_ids": layout.prefix_ids, "positions": positions}
        visible |= {"reach": layout.reach, "sequences": layout.sequences}
    angles = rotations(config, positions)
    real = layout.real
    if real is None and segments is not None:
        real = segments != 0

    def layer(x: Array, inputs: tuple[Mapping[str, Any], LayerKind]) -> tuple[Array, Any]:
        own, kind = inputs

        def attend(y: Array) -> tuple[Array, Any]:
            with jax.named_scope("attention"):
                return attention_branch(
                    y,
                    own,
                    config,
                    kind=kind,
                    angles=angles,
                    visible=visible,
                    implementation=compute.attention,
                )

        def mlp(y: Array) -> Array:
            with jax.named_scope("mlp"):
                return feed_forward(y, own, config, real=real)

        return one_layer(devices.by_rows(x), own, config, attend=attend, mlp=mlp)

    x = embed(params, config, tokens, positions, compute.dtype_of(params))
    kinds = LayerKind(*map(jnp.asarray, zip(*layer_kinds(config), strict=True)))
    return x, layer, (params["layers"], kinds)


def hidden_states(
    params: Mapping[str, Any],
    config: DecoderConfig,
    tokens: Int[Array, "batch length"],
    layout: Layout | None = None,
    *,
    compute: Compute = Compute(),
) -> Float[Array, "batch length width"]:
    """The decoder's last hidden states, after the final norm.

    Layers run under `jax.lax.scan`, so that one layer is compiled whatever the depth.

    Args:
      params: nested dict of arrays; leaves under "layers" are stacked, [layers, ...]. Adapters
        (`lora.with_adapters`) and steering (`with_steering`, `with_nulling`) are part of it.
      config: the decoder.
      tokens: ids below `config.vocab_size`.
      layout: mask, packed documents and positions; None: rows padded on the right.
      compute: precision and memory.

    Returns:
      [batch, length, width] in the computation's dtype.

    Raises:
      UserError: if `remat` is unknown or the rows are longer than learned positions reach.
    """
    x, layer, inputs = begin_layers(params, config, tokens, layout, compute=compute)
    block = compute.checkpoint(lambda x, inputs: (layer(x, inputs)[0], None))
    x, _ = jax.lax.scan(block, x, inputs)
    return norm(devices.by_rows(x), params["final_norm"], config)


def states_keys_values(
    params: Mapping[str, Any],
    config: DecoderConfig,
    tokens: Int[Array, "batch length"],
    layout: Layout | None = None,
    *,
    compute: Compute = Compute(),
) -> tuple[Float[Array, "batch length width"], tuple[Array, Array]]:
    """`hidden_states`, and all keys and values, each [layers, batch, length, kv_heads, width]."""
    x, layer, inputs = begin_layers(params, config, tokens, layout, compute=compute)
    x, keys_values = jax.lax.scan(layer, x, inputs)
    return norm(devices.by_rows(x), params["final_norm"], config), keys_values


def states_at_layers(
    params: Mapping[str, Any],
    config: DecoderConfig,
    tokens: Int[Array, "batch length"],
    layout: Layout | None = None,
    *,
    layers: Sequence[int],
    positions: Int[Array, "batch positions"],
    compute: Compute = Compute(),
) -> Float[Array, "batch layers positions width"]:
    """The residual stream at chosen layers and positions; no layer above the last is computed.

    Layers are numbered like Hugging Face's `hidden_states`: 0 is what the first layer reads, l is
    the output of layer l - 1. The last one is that before the final norm.

    Args:
      params: as in `hidden_states`.
      config: the decoder.
      tokens: as in `hidden_states`.
      layout: as in `hidden_states`.
      layers: which to read, ascending.
      positions: which positions of each row to read.
      compute: as in `hidden_states`.

    Returns:
      [batch, layers, positions, width] in the computation's dtype.

    Raises:
      UserError: there is no such layer.
    """
    wanted = list(layers)
    if not wanted or wanted != sorted(set(wanted)) or not 0 <= wanted[0] <= wanted[-1]:
        raise UserError(f"layers: {wanted} are not layers in ascending order, from 0")
    if wanted[-1] > config.layers:
        raise UserError(f"layers: there is no layer {wanted[-1]}; the last one is {config.layers}")
    x, layer, inputs = begin_layers(params, config, tokens, layout, compute=compute)

    def at_positions(x: Array) -> Array:
        return jnp.take_along_axis(x, positions[:, :, None], axis=1)[None]

    def numbered(x: Array, number: Array) -> tuple[Array, None]:
        # Indexed by number: a scan over a slice of the layers would copy their parameters.
        at = functools.partial(jax.lax.dynamic_index_in_dim, index=number, keepdims=False)
        return layer(x, jax.tree.map(at, inputs))[0], None

    block = compute.checkpoint(numbered)

    def body(carry: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
        x, kept = carry
        x, _ = block(x, number)
        hit = (jnp.asarray(wanted) == number + 1)[:, None, None, None]
        return (x, jnp.where(hit, at_positions(x), kept)), None

    first = (jnp.asarray(wanted) == 0)[:, None, None, None]
    start = x, jnp.where(first, at_positions(x), jnp.zeros((), x.dtype))
    (_, kept), _ = jax.lax.scan(body, start, jnp.arange(wanted[-1]))
    return jnp.moveaxis(kept, 0, 1)


def unembedding(
    params: Mapping[str, Any], config: ModelConfig
) -> tuple[Float[Array, "width vocabulary"], Float[Array, " vocabulary"] | None]:
    """The matrix from hidden states to logits and its bias (None where there is none)."""
    if config.tied:
        return params["embed"]["embedding"].T, None
    return params["unembed"]["kernel"], params["unembed"].get("bias")


def logits(
    params: Mapping[str, Any],
    config: DecoderConfig,
    tokens: Int[Array, "batch length"],
    layout: Layout | None = None,
    *,
    compute: Compute = Compute(),
) -> Float[Array, "batch length vocabulary"]:
    """Float32 logits at every position; `responses` has log-probs that need less memory.

    Args:
      params: as in `hidden_states`.
      config: the decoder.
      tokens: as in `hidden_states`.
      layout: as in `hidden_states`.
      compute: as in `hidden_states`.
    """
    hidden = hidden_states(params, config, tokens, layout, compute=compute)
    return unembed(hidden, config, *unembedding(params, config))


def unembed(
    hidden: Float[Array, "*rows width"],
    config: ModelConfig,
    kernel: Float[Array, "width vocabulary"] | Int8Matrix,
    bias: Float[Array, " vocabulary"] | None,
) -> Float[Array, "*rows vocabulary"]:
    """Float32 logits of hidden states, scaled and capped as the config says.

    Args:
      hidden: [..., width].
      config: of a decoder or an encoder-decoder.
      kernel: from `unembedding`, or the same in int8.
      bias: from `unembedding`.
    """
    if isinstance(kernel, Int8Matrix):
        out = int8.product(hidden, kernel, jnp.float32)
    else:
        out = multiply(hidden, kernel.astype(hidden.dtype), jnp.float32)
    if bias is not None:
        out = out + jnp.broadcast_to(bias.astype(jnp.float32), out.shape)
    if config.logit_scale is not None:
        out = out * config.logit_scale
    return softcap(out, config.logit_softcap)


_compiled_logits = jax.jit(logits, static_argnames=("config", "compute"))


class Decoder(Model):
    """A decoder with its parameters."""

    def __call__(
        self,
        tokens,
        attention_mask=None,
        *,
        positions=None,
        segment_ids=None,
        remat: str = "none",
    ) -> Float[Array, "batch length vocabulary"]:
        """Float32 logits, [batch, length, vocabulary], of int32 tokens, [batch, length]."""
        layout = Layout(
            attention_mask=None if attention_mask is None else jnp.asarray(attention_mask),
            segment_ids=None if segment_ids is None else jnp.asarray(segment_ids),
            positions=None if positions is None else jnp.asarray(positions),
        )
        compute = Compute(remat=remat, dtype=self.dtype)
        tokens = jnp.asarray(tokens)
        return _compiled_logits(self.params, self.config, tokens, layout, compute=compute)


def init_model(config: DecoderConfig, key: jax.Array, *, dtype: Any = jnp.float32) -> Decoder:
    """A decoder with random parameters."""
    return Decoder(config, init_params(config, key, dtype=dtype))
