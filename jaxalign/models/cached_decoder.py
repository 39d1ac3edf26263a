"""A decoder one token at a time, with a cache of keys and values."""

import dataclasses
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.models import devices
from jaxalign.models.compute import Compute
from jaxalign.models.config import DecoderConfig
from jaxalign.models.decoder import Layout, embed, states_keys_values
from jaxalign.models.decoder_layer import (
    feed_forward,
    layer_kinds,
    norm,
    one_layer,
    queries_keys_values,
    rotations,
)
from jaxalign.models.layers import dense, softcap, softmax
from jaxalign.models.precision import precision
from jaxalign.records import AnyArray, record


@record
class Cache:
    """Keys and values of every layer, in a ring of slots.

    All rows write into the same slot at a time, so that a write is one slice, whatever the rows'
    lengths. The tokens of a row are in the slots before it, in order; slot 0 follows the last one.

    Attributes:
      keys: one array per layer.
      values: one array per layer.
      length: number of tokens of each row; what is in the slots before them is not read.
      next_slot: the slot of the next token of every row.
    """

    keys: tuple[Float[AnyArray, "*rows kv_heads slots head_width"], ...]
    values: tuple[Float[AnyArray, "*rows kv_heads slots head_width"], ...]
    length: Int[AnyArray, " rows"]
    next_slot: Int[AnyArray, ""]


def without_row_axis(cache: Cache) -> Cache:
    """The cache of one row without its axis of rows; `advance` takes both forms.

    With the axis, XLA's CPU compiler writes each array twice, into two copies of it.
    """
    keys, values = ([x[0] for x in all_layers] for all_layers in (cache.keys, cache.values))
    return dataclasses.replace(cache, keys=tuple(keys), values=tuple(values))


def with_row_axis(cache: Cache) -> Cache:
    """The reverse of `without_row_axis`."""
    keys, values = ([x[None] for x in all_layers] for all_layers in (cache.keys, cache.values))
    return dataclasses.replace(cache, keys=tuple(keys), values=tuple(values))


def put_row(cache: Cache, one: Cache, row: Int[Array, ""]) -> Cache:
    """The cache with another one's only row in place of one of its rows.

    Args:
      cache: of several rows.
      one: of one row, with as many slots; its tokens are moved to the slots before `next_slot`.
      row: which row.
    """
    turn = cache.next_slot - one.next_slot

    def put(x: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, jnp.roll(new, turn, axis=2), row, axis=0)

    keys = tuple(put(x, new) for x, new in zip(cache.keys, one.keys, strict=True))
    values = tuple(put(x, new) for x, new in zip(cache.values, one.values, strict=True))
    length = cache.length.at[row].set(one.length[0])
    return Cache(keys=keys, values=values, length=length, next_slot=cache.next_slot)


def rewound(cache: Cache, length: Int[Array, ""]) -> Cache:
    """The cache of one row with its first tokens alone, which are moved to the slots from 0 on.

    Args:
      cache: of one row, with at least so many tokens.
      length: number of tokens that are kept.
    """
    turn = cache.length[0] - cache.next_slot

    def turned(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(jnp.roll(x, turn, axis=2) for x in arrays)

    return Cache(
        keys=turned(cache.keys),
        values=turned(cache.values),
        length=length[None],
        next_slot=length,
    )


def read_more(
    params: Mapping[str, Any],
    config: DecoderConfig,
    cache: Cache,
    tokens: Int[Array, "one new"],
    number: Int[Array, ""],
    *,
    layers: Sequence[Any] | None = None,
    dtype: Any = None,
) -> tuple[Float[Array, "one width"], Cache]:
    """The hidden state after more tokens of a single row's prompt, and the cache with them in it.

    Args:
      params: nested dict of arrays.
      config: the decoder.
      cache: from `rewound`; the slots from `next_slot` on must suffice for all of `tokens`.
      tokens: padded on the right.
      number: how many of them are real, at least 1.
      layers: as in `advance`.
      dtype: as in `prefill`.
    """
    hidden, after = advance_several(params, config, cache, tokens, layers=layers, dtype=dtype)
    slots = cache.keys[0].shape[-2]
    last = jax.lax.dynamic_index_in_dim(hidden, number - 1, axis=1, keepdims=False)
    return last, dataclasses.replace(
        after,
        length=cache.length + number,
        next_slot=jnp.mod(cache.next_slot + number, slots),
    )


def layers_of(tree: Mapping[str, Any], number: int) -> list[Any]:
    """A tree of stacked leaves, [layers, ...], as one tree per layer."""
    return [jax.tree.map(itemgetter(at), tree) for at in range(number)]


def prefill(
    params: Mapping[str, Any],
    config: DecoderConfig,
    tokens: Int[Array, "rows length"],
    prompt_length: Int[Array, " rows"],
    *,
    slots: int,
    dtype: Any = None,
) -> tuple[Float[Array, "rows width"], Cache]:
    """The hidden state after each prompt, and the cache with the prompts in it.

    Args:
      params: nested dict of arrays.
      config: the decoder.
      tokens: prompts, padded on the left: the last token of each ends its row.
      prompt_length: how many of a row's tokens are real.
      slots: size of the cache: at least the prompts' length, and the largest number of tokens of a
        row.
      dtype: of the computation and the cache; None is the parameters' own.
    """
    length = tokens.shape[1]
    real = (jnp.arange(length)[None] >= (length - prompt_length)[:, None]).astype(jnp.int32)
    layout, compute = Layout(attention_mask=real), Compute(dtype=dtype)
    hidden, kept = states_keys_values(params, config, tokens, layout, compute=compute)

    def in_slots(x: Array) -> tuple[Array, ...]:
        x = jnp.pad(jnp.moveaxis(x, 2, 3), ((0, 0),) * 3 + ((0, slots - length), (0, 0)))
        x = x.astype(kept_in(x.dtype))
        return tuple(devices.by_rows(x[number]) for number in range(config.layers))

    keys, values = map(in_slots, kept)
    return hidden[:, -1], Cache(
        keys=keys, values=values, length=prompt_length, next_slot=jnp.int32(length % slots)
    )


def kept_in(dtype: Any) -> Any:
    """The dtype of a cache for a computation in this dtype.

    It is float32 on a CPU, where XLA would convert a whole bfloat16 cache to float32 and back at
    every token.
    """
    return jnp.float32 if devices.platform() == "cpu" and dtype == jnp.bfloat16 else dtype


def advance(
    params: Mapping[str, Any],
    config: DecoderConfig,
    cache: Cache,
    tokens: Int[Array, " rows"],
    *,
    layers: Sequence[Any] | None = None,
    dtype: Any = None,
) -> tuple[Float[Array, "rows width"], Cache]:
    """The hidden state after one more token of every row, and the cache with these in it.

    Args:
      params: nested dict of arrays.
      config: the decoder.
      cache: of the tokens before. A row that already fills it loses its first token.
      tokens: one for each row.
      layers: from `layers_of`, where a loop should not slice the layers again for each token.
      dtype: as in `prefill`.
    """
    hidden, after = advance_several(
        params, config, cache, tokens[:, None], layers=layers, dtype=dtype
    )
    return hidden[:, 0], after


def advance_several(
    params: Mapping[str, Any],
    config: DecoderConfig,
    cache: Cache,
    tokens: Int[Array, "rows new"],
    *,
    layers: Sequence[Any] | None = None,
    dtype: Any = None,
) -> tuple[Float[Array, "rows new width"], Cache]:
    """`advance` by several tokens at once; those from `next_slot` to the last slot must suffice."""
    dtype = params["embed"]["embedding"].dtype if dtype is None else dtype
    new, slots = tokens.shape[1], cache.keys[0].shape[-2]
    positions = cache.length[:, None] + jnp.arange(new)[None]
    angles = rotations(config, positions)
    here = cache.next_slot + jnp.arange(new)
    distance = jnp.mod(here[:, None] - jnp.arange(slots)[None], slots)[None]
    seen = distance <= positions[:, :, None]
    near = seen if config.window is None else seen & (distance < config.window)

    kinds = layer_kinds(config)

    def through(x: Array, number: int, layer: Any) -> tuple[Array, tuple[Array, Array]]:
        """One layer, with its keys and values after it."""

        def attend(y: Array) -> tuple[Array, tuple[Array, Array]]:
            q, k, v = queries_keys_values(y, layer, config, kind=kinds[number], angles=angles)
            keys = write(cache.keys[number], k, cache.next_slot)
            values = write(cache.values[number], v, cache.next_slot)
            visible = near if kinds[number].is_windowed else seen
            sinks = layer["sinks"]["logits"] if config.sinks else None
            mixed = attend_slots(q.astype(keys.dtype), keys, values, visible, config, sinks)
            return dense(mixed.astype(y.dtype), layer["o"]), (keys, values)

        def mlp(y: Array) -> Array:
            return feed_forward(y, layer, config)

        return one_layer(devices.by_rows(x), layer, config, attend=attend, mlp=mlp)

    x = embed(params, config, tokens, positions, dtype)
    kept = []
    for number, layer in enumerate(layers or layers_of(params["layers"], config.layers)):
        x, both = through(x, number, layer)
        kept.append(both)
    keys, values = zip(*kept, strict=True)
    after = Cache(
        keys=keys,
        values=values,
        length=cache.length + new,
        next_slot=jnp.mod(cache.next_slot + new, slots),
    )
    return norm(x, params["final_norm"], config), after


def write(
    slots: Float[Array, "*rows heads slots head_width"],
    new: Float[Array, "rows new heads head_width"],
    slot: Int[Array, ""],
) -> Float[Array, "*rows heads slots head_width"]:
    """The slots with the keys or values of new tokens from one of them on."""
    new = jnp.moveaxis(new, 1, 2).astype(slots.dtype)
    new = new.reshape(*slots.shape[:-2], new.shape[2], slots.shape[-1])
    return jax.lax.dynamic_update_slice_in_dim(slots, new, slot, axis=slots.ndim - 2)


def attend_slots(
    q: Float[Array, "rows new heads head_width"],
    k: Float[Array, "*rows kv_heads slots head_width"],
    v: Float[Array, "*rows kv_heads slots head_width"],
    seen: Bool[Array, "rows new slots"],
    config: DecoderConfig,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "rows new width"]:
    """New queries of every row over the slots that each sees; softmax in float32.

    Args:
      q: queries of the new tokens.
      k: keys in the slots.
      v: values in the slots.
      seen: the slots that each query sees.
      config: the decoder.
      sinks: each head's score of attending to no slot; None: there is none.
    """
    rows, new, heads, width = q.shape
    kv_heads, at = k.shape[-3], precision(q.dtype)
    groups = heads // kv_heads
    q = jnp.moveaxis(q.reshape(rows, new, kv_heads, groups, width), 1, 2)
    q = q.reshape(*k.shape[:-2], new * groups, width)
    seen = seen if new == 1 else jnp.repeat(seen, groups, axis=1)
    seen = seen[:, None] if k.ndim == 4 else seen
    scores = jnp.einsum(
        "...kqd,...ksd->...kqs", q, k, precision=at, preferred_element_type=jnp.float32
    )
    scores = softcap(scores * config.scale, config.attention_softcap)
    if sinks is not None:
        each = jnp.broadcast_to(sinks.reshape(kv_heads, 1, groups), (kv_heads, new, groups))
        sinks = each.astype(jnp.float32).reshape(*[1] * (k.ndim - 3), kv_heads, new * groups, 1)
    weights = softmax(jnp.where(seen, scores, -1e30), sinks)
    mixed = jnp.einsum("...kqs,...ksd->...kqd", weights.astype(q.dtype), v, precision=at)
    mixed = jnp.moveaxis(mixed.reshape(rows, kv_heads, new, groups, width), 2, 1)
    return mixed.reshape(rows, new, heads * width)
