"""A decoder one token at a time, with a cache of keys and values."""

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
from jaxalign.models.decoder_layer import norm, one_layer, queries_keys_values, rotations
from jaxalign.models.layers import dense, mlp_branch, softcap
from jaxalign.models.precision import precision
from jaxalign.records import AnyArray, record


@record
class Cache:
    """Keys and values of every layer; all rows write into the same slot at a time.

    Attributes:
      keys: one array per layer.
      values: one array per layer.
      first: the slot of each row's first token; those before it are padding.
      used: how many slots hold a token.
    """

    keys: tuple[Float[AnyArray, "rows kv_heads slots head_width"], ...]
    values: tuple[Float[AnyArray, "rows kv_heads slots head_width"], ...]
    first: Int[AnyArray, " rows"]
    used: Int[AnyArray, ""]


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
      slots: size of the cache: the prompts' length and the number of tokens to generate.
      dtype: of the computation and the cache; None is the parameters' own.
    """
    length = tokens.shape[1]
    first = length - prompt_length
    real = (jnp.arange(length)[None] >= first[:, None]).astype(jnp.int32)
    layout, compute = Layout(attention_mask=real), Compute(dtype=dtype)
    hidden, kept = states_keys_values(params, config, tokens, layout, compute=compute)

    def in_slots(x: Array) -> tuple[Array, ...]:
        x = jnp.pad(jnp.moveaxis(x, 2, 3), ((0, 0),) * 3 + ((0, slots - length), (0, 0)))
        return tuple(devices.by_rows(x[number]) for number in range(config.layers))

    keys, values = map(in_slots, kept)
    return hidden[:, -1], Cache(keys=keys, values=values, first=first, used=jnp.int32(length))


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
      cache: of the tokens before; it has a free slot.
      tokens: one for each row.
      layers: from `layers_of`, where a loop should not slice the layers again for each token.
      dtype: as in `prefill`.
    """
    dtype = params["embed"]["embedding"].dtype if dtype is None else dtype
    positions = (cache.used - cache.first)[:, None]
    angles = rotations(config, positions)
    place = jnp.arange(cache.keys[0].shape[2])[None]
    seen = (place >= cache.first[:, None]) & (place <= cache.used)
    near = seen if config.window is None else seen & (cache.used - place < config.window)

    def through(x: Array, number: int, layer: Any) -> tuple[Array, tuple[Array, Array]]:
        """One layer, with its keys and values after it."""
        windowed = bool(config.windowed) and config.windowed[number]

        def attend(y: Array) -> tuple[Array, tuple[Array, Array]]:
            q, k, v = queries_keys_values(y, layer, config, is_windowed=windowed, angles=angles)
            keys = write(cache.keys[number], k, cache.used)
            values = write(cache.values[number], v, cache.used)
            mixed = attend_slots(q[:, 0], keys, values, near if windowed else seen, config)
            return dense(mixed, layer["o"]), (keys, values)

        def mlp(y: Array) -> Array:
            return mlp_branch(y, layer, config)

        return one_layer(devices.by_rows(x), layer, config, attend=attend, mlp=mlp)

    x = embed(params, config, tokens[:, None], positions, dtype)
    kept = []
    for number, layer in enumerate(layers or layers_of(params["layers"], config.layers)):
        x, both = through(x, number, layer)
        kept.append(both)
    keys, values = zip(*kept, strict=True)
    after = Cache(keys=keys, values=values, first=cache.first, used=cache.used + 1)
    return norm(x, params["final_norm"], config)[:, 0], after


def write(
    slots: Float[Array, "rows heads slots head_width"],
    new: Float[Array, "rows one heads head_width"],
    slot: Int[Array, ""],
) -> Float[Array, "rows heads slots head_width"]:
    """The slots with one token's keys or values in one of them."""
    new = jnp.moveaxis(new, 1, 2).astype(slots.dtype)
    return jax.lax.dynamic_update_slice_in_dim(slots, new, slot, axis=2)


def attend_slots(
    q: Float[Array, "rows heads head_width"],
    k: Float[Array, "rows kv_heads slots head_width"],
    v: Float[Array, "rows kv_heads slots head_width"],
    seen: Bool[Array, "rows slots"],
    config: DecoderConfig,
) -> Float[Array, "rows one width"]:
    """One query of every row over the slots that it sees; softmax in float32."""
    rows, heads, width = q.shape
    groups, at = heads // k.shape[1], precision(q.dtype)
    q = q.reshape(rows, k.shape[1], groups, width)
    scores = jnp.einsum("rkgd,rksd->rkgs", q, k, precision=at, preferred_element_type=jnp.float32)
    scores = softcap(scores * config.scale, config.attention_softcap)
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30), axis=-1)
    mixed = jnp.einsum("rkgs,rksd->rkgd", weights.astype(q.dtype), v, precision=at)
    return mixed.reshape(rows, 1, heads * width)
