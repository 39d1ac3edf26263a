"""A decoder one token at a time: keys and values of all tokens so far wait in a cache."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.models import devices
from jaxalign.models.config import DecoderConfig
from jaxalign.models.decoder import (
    first_states,
    mlp_branch,
    norm,
    one_layer,
    queries_keys_values,
    rotations,
    states_and_keys,
)
from jaxalign.models.layers import dense, softcap
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
    """What is stacked over layers, cut up: [layers, ...] leaves as one tree for each of them."""
    return [jax.tree.map(itemgetter(at), tree) for at in range(number)]


def prefill(
    params: Mapping[str, Any],
    config: DecoderConfig,
    tokens: Int[Array, "rows length"],
    prompt_length: Int[Array, " rows"],
    *,
    slots: int,
    adapters: Mapping[str, Any] | None = None,
    adapter_scale: float | Float[Array, ""] = 1.0,
    added: Float[Array, "layers width"] | None = None,
    dtype: Any = None,
) -> tuple[Float[Array, "rows width"], Cache]:
    """The hidden state after each prompt, and the cache with the prompts in it.

    Args:
      params: nested dict of arrays.
      config: the decoder.
      tokens: prompts, padded on the left: the last token of each ends its row.
      prompt_length: how many of a row's tokens are real.
      slots: of the cache: the prompts' length and what is to be generated.
      adapters: as in `decoder.hidden_states`.
      adapter_scale: as in `decoder.hidden_states`.
      added: as in `decoder.states_and_keys`: how a policy is steered.
      dtype: of the computation and the cache; None is the parameters' own.
    """
    length = tokens.shape[1]
    first = length - prompt_length
    hidden, kept = states_and_keys(
        params,
        config,
        tokens,
        attention_mask=(jnp.arange(length)[None] >= first[:, None]).astype(jnp.int32),
        adapters=adapters,
        adapter_scale=adapter_scale,
        added=added,
        dtype=dtype,
        keep=True,
    )

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
    adapters: Mapping[str, Any] | None = None,
    adapter_scale: float | Float[Array, ""] = 1.0,
    added: Float[Array, "layers width"] | None = None,
    dtype: Any = None,
) -> tuple[Float[Array, "rows width"], Cache]:
    """The hidden state after one more token of every row, and the cache with these in it.

    Args:
      params: nested dict of arrays.
      config: the decoder.
      cache: of the tokens before; it has a free slot.
      tokens: one for each row.
      layers: from `layers_of`, where a loop should not cut the layers out anew for each token.
      adapters: as in `decoder.hidden_states`.
      adapter_scale: as in `decoder.hidden_states`.
      added: as in `decoder.states_and_keys`: how a policy is steered.
      dtype: as in `prefill`.
    """
    dtype = params["embed"]["embedding"].dtype if dtype is None else dtype
    positions = (cache.used - cache.first)[:, None]
    angles = rotations(config, positions)
    place = jnp.arange(cache.keys[0].shape[2])[None]
    seen = (place >= cache.first[:, None]) & (place <= cache.used)
    near = seen if config.window is None else seen & (cache.used - place < config.window)
    updates = [{}] * config.layers
    if adapters is not None:
        updates = layers_of(adapters["layers"], config.layers)

    def through(x: Array, number: int, layer: Any) -> tuple[Array, tuple[Array, Array]]:
        """One layer, with its keys and values after it."""
        own = {"adapters": updates[number], "scale": adapter_scale}
        windowed = bool(config.windowed) and config.windowed[number]

        def attend(y: Array) -> tuple[Array, tuple[Array, Array]]:
            turned = {"is_windowed": windowed, "angles": angles}
            q, k, v = queries_keys_values(y, layer, config, **own, **turned)
            keys = write(cache.keys[number], k, cache.used)
            values = write(cache.values[number], v, cache.used)
            mixed = attend_slots(q[:, 0], keys, values, near if windowed else seen, config)
            out = dense(mixed, layer["o"], own["adapters"].get("o"), adapter_scale)
            return out, (keys, values)

        def mlp(y: Array) -> Array:
            return mlp_branch(y, layer, config, **own)

        return one_layer(devices.by_rows(x), layer, config, attend=attend, mlp=mlp)

    x = first_states(params, config, tokens[:, None], positions, dtype)
    kept = []
    for number, layer in enumerate(layers or layers_of(params["layers"], config.layers)):
        x, both = through(x, number, layer)
        if added is not None:
            x = x + added[number].astype(x.dtype)[None, None]
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
