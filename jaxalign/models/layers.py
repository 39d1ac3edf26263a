"""The layers of the shared models: dense, norms, activations, attention; all pure functions."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.models import devices
from jaxalign.models.precision import precision
from jaxalign.models.probes import matmul, spread

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def dense(
    x: Float[Array, "... inputs"],
    params: Mapping[str, Any],
    adapter: Mapping[str, Any] | None = None,
    adapter_scale: float | Float[Array, ""] = 1.0,
) -> Float[Array, "... outputs"]:
    r"""The one matrix product of all models: computed in the dtype of `x`.

    .. math:: y = x W + b + s \, x A B

    Args:
      x: inputs, [..., inputs].
      params: {"kernel": [inputs, outputs], "bias"?: [outputs]} in any float dtype; with a
        "probe", the gradients of both are watched (`probes`).
      adapter: low-rank update {"a": [inputs, rank], "b": [rank, outputs]}, or None; with
        "dropout_key" and "dropout_rate" its input is dropped (`lora.with_dropout`), with a
        "probe" it is watched.
      adapter_scale: s, alpha / rank of the low-rank update.

    Returns:
      [..., outputs] in the dtype of `x`.
    """
    probe = params.get("probe")
    y = matmul(x, params["kernel"], probe)
    if "bias" in params:
        y = y + spread(params["bias"], y.shape, x.dtype, probe)
    if adapter is not None:
        if "dropout_key" in adapter:
            x = dropout(x, adapter["dropout_key"], adapter["dropout_rate"])
        probe = adapter.get("probe")
        update = matmul(matmul(x, adapter["a"], probe), adapter["b"], probe)
        y = y + update * jnp.asarray(adapter_scale, x.dtype)
    return y


def look_up(
    params: Mapping[str, Any], ids: Int[Array, "rows length"], dtype: Any
) -> Float[Array, "rows length width"]:
    """Rows of {"embedding": [ids, width]}; a "lookup", [rows, length, width] of zeros, is added.

    Its cotangent is that of every row that was looked up: how embeddings are watched.
    """
    table = devices.as_table(params["embedding"])
    x = devices.by_rows(jnp.take(table, ids, axis=0).astype(dtype))
    return x + params["lookup"].astype(dtype) if "lookup" in params else x


def dropout(
    x: Float[Array, "... width"], key: Array, rate: float | Float[Array, ""]
) -> Float[Array, "... width"]:
    """Each element is 0 with probability `rate`, else divided by 1 - rate: x in expectation."""
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


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """`cap * tanh(x / cap)`; None leaves x as it is."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attention(
    q: Float[Array, "batch length heads head_width"],
    k: Float[Array, "batch length kv_heads head_width"],
    v: Float[Array, "batch length kv_heads head_width"],
    *,
    scale: float,
    segment_ids: Int[Array, "batch length"] | None = None,
    prefix_ids: Int[Array, "batch length"] | None = None,
    positions: Int[Array, "batch length"] | None = None,
    window: int | None = None,
    cap: float | None = None,
    implementation: str = "auto",
    query_block: int = 512,
) -> Float[Array, "batch length heads head_width"]:
    """Causal attention that never forms a [length, length] array of scores for long sequences.

    Args:
      q: queries; heads is a multiple of kv_heads (grouped queries).
      k: keys.
      v: values.
      scale: factor on query-key products.
      segment_ids: a position sees its own segment alone (padding is one more segment). None
        means one segment; rows padded on the right need none, since causality hides padding.
      prefix_ids: the segment that a position's own one continues, and that it sees, too.
      positions: what a window counts in; by default the place in the row.
      window: a position sees itself and the `window - 1` positions before it; None sees all.
      cap: soft cap on scores (Gemma 2), or None.
      implementation: "auto", "blocked" (any device) or "cudnn" (GPU, 16 bit, no segments, no
        cap).
      query_block: how many queries "blocked" treats at a time.

    Returns:
      [batch, length, heads, head_width] in the dtype of `q`.
    """
    if implementation == "auto":
        plain = segment_ids is None and cap is None
        fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0
        on_gpu = devices.platform() == "gpu"
        small = q.shape[-1] <= 128
        implementation = "cudnn" if on_gpu and plain and fits and small else "blocked"
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    place = jnp.arange(q.shape[1])[None]
    row = _Row(
        place=place,
        segment=jnp.ones_like(place) if segment_ids is None else segment_ids,
        prefix=prefix_ids,
        position=place if prefix_ids is None or positions is None else positions,
    )
    return _blocked_attention(q, k, v, row, scale, window, cap, query_block)


class _Row(NamedTuple):
    """Where the positions of rows stand, each [batch or 1, length]."""

    place: Array
    segment: Array
    prefix: Array | None
    position: Array

    def map(self, change: Callable[[Array], Array]) -> "_Row":
        return jax.tree.map(change, self)


def _blocked_attention(q, k, v, row, scale, window, cap, block):
    """Exact attention, one block of queries at a time; windows read only the keys they see."""
    batch, length, heads, width = q.shape
    k, v = devices.whole_length(k), devices.whole_length(v)
    if length <= block:
        return _attend(q, k, v, row, row, scale, window, cap)
    padding = -length % block
    blocks = (length + padding) // block
    strewn = devices.splits_length()  # every block over the whole row: a part for each device

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        sizes = (block, blocks) if strewn else (blocks, block)
        return jnp.moveaxis(x.reshape(x.shape[0], *sizes, *x.shape[2:]), 2 if strewn else 1, 0)

    # A windowed block reads its own positions and the window - 1 positions before them.
    narrow = window is not None and row.prefix is None and not strewn
    span = min(length, block + window - 1) if narrow else length

    @jax.checkpoint
    def one_block(start, q_block, q_row):
        first = jnp.clip(start + block - span, 0, length - span)

        def read(x):
            return jax.lax.dynamic_slice_in_dim(x, first, span, axis=1) if narrow else x

        return _attend(q_block, read(k), read(v), q_row, row.map(read), scale, window, cap)

    def step(_, inputs):
        return None, one_block(*inputs)

    starts = jnp.arange(blocks) * block
    _, out = jax.lax.scan(step, None, (starts, split(q), row.map(split)))
    out = jnp.moveaxis(out, 0, 2 if strewn else 1)
    return out.reshape(batch, -1, heads, width)[:, :length]


def _attend(q, k, v, queries, keys, scale, window, cap):
    """Attention of a set of queries; on one CPU row by row, whose scores then stay in the cache."""
    attend = functools.partial(_attend_row, scale=scale, window=window, cap=cap)

    def of_rows(row: _Row) -> _Row:
        return row.map(lambda x: jnp.broadcast_to(x, (q.shape[0], x.shape[1])))

    inputs = q, k, v, of_rows(queries), of_rows(keys)
    if devices.one_cpu():
        return jax.lax.map(jax.checkpoint(lambda row: attend(*row)), inputs)
    return jax.vmap(attend)(*inputs)


def _attend_row(q, k, v, queries, keys, *, scale, window, cap):
    """Scores, softmax and mixture for the queries of one row; softmax in float32."""
    number, heads, width = q.shape
    kv_heads, at = k.shape[1], precision(q.dtype)
    groups = heads // kv_heads
    # a head's queries with the groups innermost: positions stay split as they are
    grouped = jnp.moveaxis(q.reshape(number, kv_heads, groups, width), 0, 1)
    grouped = grouped.reshape(kv_heads, number * groups, width)
    scores = jnp.einsum(
        "hqd,shd->hqs", grouped, k, precision=at, preferred_element_type=jnp.float32
    )
    scores = softcap(scores * scale, cap)
    seen = jnp.repeat(_sees(queries, keys, window), groups, axis=0)
    weights = jax.nn.softmax(jnp.where(seen[None], scores, -1e30), axis=-1).astype(q.dtype)
    mixed = jnp.einsum("hqs,shd->hqd", weights, v, precision=at)
    mixed = jnp.moveaxis(mixed.reshape(kv_heads, number, groups, width), 0, 1)
    return mixed.reshape(number, heads, width)


def _sees(queries: _Row, keys: _Row, window: int | None) -> Bool[Array, "queries keys"]:
    """Which keys a query sees: none behind it, those of its segment and of the one before."""

    def pairs(of_query: Array, of_key: Array) -> tuple[Array, Array]:
        return of_query[:, None], of_key[None, :]

    query, key = pairs(queries.segment, keys.segment)
    seen = query == key
    if queries.prefix is not None:
        seen |= queries.prefix[:, None] == key
    query, key = pairs(queries.place, keys.place)
    seen &= query >= key
    if window is not None:
        query, key = pairs(queries.position, keys.position)
        seen &= query - key < window
    return seen
