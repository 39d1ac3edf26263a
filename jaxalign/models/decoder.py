"""The shared decoder: parameters as a nested dict, the forward pass as a pure function."""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxalign.errors import UserError
from jaxalign.models import devices
from jaxalign.models.attention import attention
from jaxalign.models.config import DecoderConfig
from jaxalign.models.layers import ACTIVATIONS, dense, layer_norm, look_up, rms_norm, softcap
from jaxalign.models.precision import precision
from jaxalign.models.rope import rope_angles, rotate
from jaxalign.models.shell import Model

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention_output"),
}


def parameter_shapes(config: DecoderConfig) -> dict[str, Any]:
    """The shape of every parameter, in the nested dict's own form."""
    width, heads = config.width, config.heads * config.head_width
    kv, bias = config.kv_heads * config.head_width, config.norm == "layer"

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
        "up": kernel(width, config.mlp_width, config.mlp_bias),
        "down": kernel(config.mlp_width, width, config.mlp_bias),
    }
    if config.gated:
        layers["gate"] = kernel(width, config.mlp_width, config.mlp_bias)
    if config.norm_placement != "post":
        layers |= {name: norms(config.layers, width) for name in ("attention_norm", "mlp_norm")}
    if config.norm_placement in ("post", "sandwich"):
        names = ("post_attention_norm", "post_mlp_norm")
        layers |= {name: norms(config.layers, width) for name in names}
    if config.qk_norm is not None:
        sizes = (heads, kv) if config.qk_norm == "width" else (config.head_width,) * 2
        layers["q_norm"] = {"scale": (config.layers, sizes[0])}
        layers["k_norm"] = {"scale": (config.layers, sizes[1])}
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


def norm(x: jax.Array, params: Mapping[str, Any], config: DecoderConfig) -> jax.Array:
    """The config's norm over the last axis."""
    if config.norm == "layer":
        return layer_norm(x, params, eps=config.norm_eps)
    return rms_norm(x, params, eps=config.norm_eps, offset=config.norm_offset)


def _positions(length, attention_mask, segment_ids):
    """Positions count from the first real token of each row, or of each packed segment."""
    places = jnp.arange(length)[None, :]
    if segment_ids is not None:
        before = jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
        starts = jnp.where(segment_ids != before, places, 0)
        return places - jax.lax.cummax(starts, axis=1)
    if attention_mask is not None:
        leading = jnp.argmax(attention_mask != 0, axis=1)[:, None]
        return jnp.maximum(places - leading, 0)
    return places


def queries_keys_values(
    x: Float[Array, "batch length width"],
    layer: Mapping[str, Any],
    config: DecoderConfig,
    *,
    adapters: Mapping[str, Any],
    scale: float | Float[Array, ""],
    is_windowed: Any,
    angles: Any,
) -> tuple[Array, Array, Array]:
    """A layer's queries, keys and values, normed and rotated, [batch, length, heads, head_width].

    Args:
      x: what the layer's attention reads.
      layer: its parameters.
      config: the decoder.
      adapters: its low-rank updates; empty: none.
      scale: factor on these.
      is_windowed: whether it is a sliding-window layer, which may turn at a speed of its own.
      angles: cosines and sines for each kind of rotation, from `rotations`; None: no rotation.
    """
    batch, length, _ = x.shape

    def project(name: str, heads: int) -> jax.Array:
        y = dense(x, layer[name], adapters.get(name), scale)
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
                jnp.where(is_windowed, local, full)
                for local, full in zip(angles[1], angles[0], strict=True)
            )
        q, k = rotate(q, cosines, sines), rotate(k, cosines, sines)
    return q, k, v


def _attention_branch(x, layer, adapters, scale, is_windowed, angles, seen, config, how):
    """What attention adds to the residual stream, and the keys and values that it read."""
    turned = {"adapters": adapters, "scale": scale, "is_windowed": is_windowed, "angles": angles}
    q, k, v = queries_keys_values(x, layer, config, **turned)
    attend = functools.partial(
        attention,
        scale=config.scale,
        **seen,
        cap=config.attention_softcap,
        implementation=how,
    )
    if config.windowed and all(config.windowed):
        mixed = attend(q, k, v, window=config.window)
    elif any(config.windowed):
        narrow = functools.partial(attend, window=config.window)
        mixed = jax.lax.cond(is_windowed, narrow, attend, q, k, v)
    else:
        mixed = attend(q, k, v)
    mixed = checkpoint_name(mixed, "attention_output")
    mixed = mixed.reshape(*x.shape[:2], -1)
    return dense(mixed, layer["o"], adapters.get("o"), scale), (k, v)


def mlp_branch(
    x: Float[Array, "... width"],
    layer: Mapping[str, Any],
    config: DecoderConfig,
    *,
    adapters: Mapping[str, Any],
    scale: float | Float[Array, ""],
) -> Float[Array, "... width"]:
    """What a layer's MLP adds to the residual stream."""
    activation = ACTIVATIONS[config.activation]
    y = dense(x, layer["up"], adapters.get("up"), scale)
    if config.gated:
        y = activation(dense(x, layer["gate"], adapters.get("gate"), scale)) * y
    else:
        y = activation(y)
    return dense(y, layer["down"], adapters.get("down"), scale)


def one_layer(
    x: Float[Array, "... width"],
    layer: Mapping[str, Any],
    config: DecoderConfig,
    *,
    attend: Callable[[Array], tuple[Array, Any]],
    mlp: Callable[[Array], Array],
) -> tuple[Float[Array, "... width"], Any]:
    """One layer: the two branches, with norms where the config puts them.

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
        return norm(y, layer[name], config) if placed else y

    attended, kept = attend(before("attention_norm", x))
    attended = after("post_attention_norm", attended)
    if config.norm_placement == "parallel":
        return x + attended + mlp(before("mlp_norm", x)), kept
    x = x + attended
    return x + after("post_mlp_norm", mlp(before("mlp_norm", x))), kept


def rotations(config: DecoderConfig, positions: Int[Array, "batch length"]) -> Any:
    """Cosines and sines at each position for each kind of rotation; None: positions are learned."""
    if config.position_kind == "learned":
        return None
    ropes = [config.rope] if config.local_rope is None else [config.rope, config.local_rope]
    sizes = config.head_width, config.context_length
    return [rope_angles(rope, *sizes, positions) for rope in ropes]


def first_states(
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


def hidden_states(
    params: Mapping[str, Any],
    config: DecoderConfig,
    tokens: Int[Array, "batch length"],
    **options: Any,
) -> Float[Array, "batch length width"]:
    """The decoder's last hidden states, after the final norm.

    Args:
      params: nested dict of arrays; leaves under "layers" are stacked, [layers, ...].
      config: the decoder.
      tokens: [batch, length], ids below `config.vocab_size`.
      **options: those of `states_and_keys`.

    Returns:
      [batch, length, width] in the computation's dtype.

    Raises:
      UserError: if `remat` is unknown or the rows are longer than learned positions reach.
    """
    return states_and_keys(params, config, tokens, **options)[0]


def states_and_keys(
    params: Mapping[str, Any],
    config: DecoderConfig,
    tokens: Int[Array, "batch length"],
    *,
    attention_mask: Array | None = None,
    positions: Int[Array, "batch length"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
    prefix_ids: Int[Array, "batch length"] | None = None,
    adapters: Mapping[str, Any] | None = None,
    adapter_scale: float | Float[Array, ""] = 1.0,
    remat: str = "none",
    dtype: Any = None,
    attention_kind: str = "auto",
    added: Float[Array, "layers width"] | None = None,
    keep: bool = False,
) -> tuple[Float[Array, "batch length width"], Any]:
    """The decoder's last hidden states, after the final norm, and what a cache wants to keep.

    Layers run under `jax.lax.scan`, so that one block is compiled whatever the depth. Rows padded
    on the right need no mask: causality hides the padding from every real token, and on a GPU
    the fused kernel is then used.

    Args:
      params: nested dict of arrays; leaves under "layers" are stacked, [layers, ...].
      config: the decoder.
      tokens: [batch, length], ids below `config.vocab_size`.
      attention_mask: [batch, length], nonzero at real tokens; padding on either side.
      positions: [batch, length]; by default counted from each row's first real token, or from
        the first token of each segment.
      segment_ids: [batch, length]; packed documents 1, 2, ...; 0 is padding. A token sees its own
        document alone.
      prefix_ids: the segment that a token's own one continues, and that it sees, too; `positions`
        are then to be given.
      adapters: low-rank updates {"layers": {"q": {"a": [layers, in, rank], "b": [layers, rank,
        out]}, ...}}, or None for the weights alone.
      adapter_scale: factor on the updates, alpha / rank.
      remat: what the backward pass computes again: "none", "full" (whole layers), "dots" (all but
        matrix products), "attention" (all but attention outputs).
      dtype: of the computation; None is the parameters' own.
      attention_kind: "auto", or the implementation that `attention` should use.
      added: a vector for each layer, added to what leaves it at every position; None: none.
      keep: also return every layer's keys and values.

    Returns:
      [batch, length, width] in `dtype`; and, if asked for, keys and values, each [layers, batch,
      length, kv_heads, head_width].

    Raises:
      UserError: if `remat` is unknown or the rows are longer than learned positions reach.
    """
    x, block, inputs = _begun(
        params,
        config,
        tokens,
        attention_mask=attention_mask,
        positions=positions,
        segment_ids=segment_ids,
        prefix_ids=prefix_ids,
        adapters=adapters,
        adapter_scale=adapter_scale,
        dtype=dtype,
        attention_kind=attention_kind,
        added=added,
        keep=keep,
    )
    x, kept = jax.lax.scan(_rematerialised(block, remat), x, inputs)
    return norm(devices.by_rows(x), params["final_norm"], config), kept


def begin_layers(
    params: Mapping[str, Any],
    config: DecoderConfig,
    tokens: Int[Array, "batch length"],
    **options: Any,
) -> tuple[Float[Array, "batch length width"], Callable, Any]:
    """The parts of `hidden_states`, for those who go through the layers themselves.

    Args:
      params: as in `hidden_states`.
      config: the decoder.
      tokens: as in `hidden_states`.
      **options: those of `states_and_keys`, without `remat` and `keep`.

    Returns:
      What the first layer reads; a layer, (x, inputs) -> (x, None); and the layers' inputs, stacked
      [layers, ...]: parameters, adapters, whether the layer is windowed, and what is added to it.
    """
    return _begun(params, config, tokens, **options)


def states_at_layers(
    params: Mapping[str, Any],
    config: DecoderConfig,
    tokens: Int[Array, "batch length"],
    *,
    layers: Sequence[int],
    places: Int[Array, "batch places"],
    remat: str = "none",
    **options: Any,
) -> Float[Array, "batch layers places width"]:
    """The residual stream at chosen layers and places; nothing above the last one is computed.

    Layers are numbered as Hugging Face's `hidden_states` are: 0 is what the first block reads, l
    is what block l - 1 leaves. The last one is that before the final norm.

    Args:
      params: nested dict of arrays; leaves under "layers" are stacked, [layers, ...].
      config: the decoder.
      tokens: [batch, length].
      layers: which to read, ascending.
      places: which positions of each row.
      remat: as in `states_and_keys`.
      **options: the others of `states_and_keys`, but `keep`.

    Returns:
      [batch, layers, places, width] in the computation's dtype.

    Raises:
      UserError: there is no such layer.
    """
    wanted = list(layers)
    if not wanted or wanted != sorted(set(wanted)) or not 0 <= wanted[0] <= wanted[-1]:
        raise UserError(f"layers: {wanted} are not layers in ascending order, from 0")
    if wanted[-1] > config.layers:
        raise UserError(f"layers: there is no layer {wanted[-1]}; the last one is {config.layers}")
    x, block, inputs = _begun(params, config, tokens, **options)

    def taken(x: Array) -> Array:
        return jnp.take_along_axis(x, places[:, :, None], axis=1)[None]

    def numbered(x: Array, number: Array) -> tuple[Array, None]:
        # Read by number: a scan over the layers below the last wanted one would copy these.
        at = functools.partial(jax.lax.dynamic_index_in_dim, index=number, keepdims=False)
        return block(x, jax.tree.map(at, inputs))[0], None

    through = _rematerialised(numbered, remat)

    def body(carry: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
        x, kept = carry
        x, _ = through(x, number)
        hit = (jnp.asarray(wanted) == number + 1)[:, None, None, None]
        return (x, jnp.where(hit, taken(x), kept)), None

    first = (jnp.asarray(wanted) == 0)[:, None, None, None]
    begun = x, jnp.where(first, taken(x), jnp.zeros((), x.dtype))
    (_, kept), _ = jax.lax.scan(body, begun, jnp.arange(wanted[-1]))
    return jnp.moveaxis(kept, 0, 1)


def _rematerialised(block: Callable, remat: str) -> Callable:
    """The block, keeping for the backward pass what `remat` says.

    Raises:
      UserError: it is unknown.
    """
    if remat == "none":
        return block
    if remat not in REMAT_POLICIES:
        raise UserError(f"remat: {remat!r} is not one of none, {', '.join(REMAT_POLICIES)}")
    return jax.checkpoint(block, policy=REMAT_POLICIES[remat], prevent_cse=False)


def _begun(
    params: Mapping[str, Any],
    config: DecoderConfig,
    tokens: Int[Array, "batch length"],
    *,
    attention_mask: Array | None = None,
    positions: Int[Array, "batch length"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
    prefix_ids: Int[Array, "batch length"] | None = None,
    adapters: Mapping[str, Any] | None = None,
    adapter_scale: float | Float[Array, ""] = 1.0,
    dtype: Any = None,
    attention_kind: str = "auto",
    added: Float[Array, "layers width"] | None = None,
    keep: bool = False,
) -> tuple[Array, Callable, Any]:
    """What the first block reads, a block, and what each block reads besides, stacked."""
    length = tokens.shape[1]
    reaches = length > config.context_length and prefix_ids is None
    if config.position_kind == "learned" and reaches:
        raise UserError(
            f"length: {length} tokens, but {config.family} has learned positions for "
            f"{config.context_length}; shorten the rows"
        )
    if positions is None:
        positions = _positions(length, attention_mask, segment_ids)
    segments = segment_ids
    if attention_mask is not None:
        real = (attention_mask != 0).astype(jnp.int32)
        segments = real if segment_ids is None else segment_ids * real
    seen: dict[str, Any] = {"segment_ids": segments}
    if prefix_ids is not None:
        seen |= {"prefix_ids": prefix_ids, "positions": positions}

    dtype = params["embed"]["embedding"].dtype if dtype is None else dtype
    x, angles = first_states(params, config, tokens, positions, dtype), rotations(config, positions)

    def block(x, inputs):
        layer, updates, is_windowed, steered = inputs

        def attend(y):
            branch = is_windowed, angles, seen, config, attention_kind
            with jax.named_scope("attention"):
                return _attention_branch(y, layer, updates, adapter_scale, *branch)

        def mlp(y):
            with jax.named_scope("mlp"):
                return mlp_branch(y, layer, config, adapters=updates, scale=adapter_scale)

        x, kept = one_layer(devices.by_rows(x), layer, config, attend=attend, mlp=mlp)
        if steered is not None:
            x = x + steered.astype(x.dtype)[None, None]
        return x, kept if keep else None

    windowed = jnp.asarray(config.windowed or (False,) * config.layers)
    updates = {} if adapters is None else adapters["layers"]
    return x, block, (params["layers"], updates, windowed, added)


def unembedding(
    params: Mapping[str, Any], config: DecoderConfig
) -> tuple[Float[Array, "width vocabulary"], Float[Array, " vocabulary"] | None]:
    """The matrix from hidden states to logits and its bias (None where there is none)."""
    if config.tied:
        return params["embed"]["embedding"].T, None
    return params["unembed"]["kernel"], params["unembed"].get("bias")


def logits(
    params: Mapping[str, Any], config: DecoderConfig, tokens: Int[Array, "batch length"], **options
) -> Float[Array, "batch length vocabulary"]:
    """Float32 logits at every position; for training use log-probs without logits instead.

    Args:
      params: nested dict of arrays.
      config: the decoder.
      tokens: [batch, length].
      **options: those of `hidden_states`.

    Returns:
      [batch, length, vocabulary], float32.
    """
    hidden = hidden_states(params, config, tokens, **options)
    return unembed(hidden, config, *unembedding(params, config))


def unembed(
    hidden: Float[Array, "*rows width"],
    config: Any,
    kernel: Float[Array, "width vocabulary"],
    bias: Float[Array, " vocabulary"] | None,
) -> Float[Array, "*rows vocabulary"]:
    """Float32 logits of hidden states, scaled and capped as the config says.

    Args:
      hidden: [..., width].
      config: of a decoder or an encoder-decoder.
      kernel: with the bias, what the architecture's `unembedding` returns.
      bias: or None.
    """
    out = jnp.matmul(
        hidden,
        kernel.astype(hidden.dtype),
        precision=precision(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    if bias is not None:
        out = out + jnp.broadcast_to(bias.astype(jnp.float32), out.shape)
    if config.logit_scale is not None:
        out = out * config.logit_scale
    return softcap(out, config.logit_softcap)


@functools.partial(jax.jit, static_argnames=("config", "remat", "dtype"))
def _compiled_logits(params, config, tokens, attention_mask, positions, segment_ids, remat, dtype):
    return logits(
        params,
        config,
        tokens,
        attention_mask=attention_mask,
        positions=positions,
        segment_ids=segment_ids,
        remat=remat,
        dtype=dtype,
    )


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
        arrays = [
            None if x is None else jnp.asarray(x)
            for x in (tokens, attention_mask, positions, segment_ids)
        ]
        return _compiled_logits(self.params, self.config, *arrays, remat, self.dtype)


def init_model(config: DecoderConfig, key: jax.Array, *, dtype: Any = jnp.float32) -> Decoder:
    """A decoder with random parameters."""
    return Decoder(config, init_params(config, key, dtype=dtype))
