"""An encoder-decoder one token at a time: the encoder runs once, the decoder keeps a cache."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.models import devices
from jaxalign.models.cached_decoder import layers_of, write
from jaxalign.models.config import EncoderDecoderConfig
from jaxalign.models.encoder_decoder import attend, encode, mlp_branch
from jaxalign.models.layers import dense, look_up, rms_norm
from jaxalign.records import AnyArray, record


@record
class CrossCache:
    """The decoder's own keys and values, and those of what the encoder read.

    Attributes:
      keys: one array per layer.
      values: one array per layer.
      memory_keys: of the encoder's output, one array per layer.
      memory_values: of the encoder's output, one array per layer.
      memory_mask: the prompts' real tokens.
      used: how many slots hold a token.
    """

    keys: tuple[Float[AnyArray, "rows heads slots head_width"], ...]
    values: tuple[Float[AnyArray, "rows heads slots head_width"], ...]
    memory_keys: tuple[Float[AnyArray, "rows length heads head_width"], ...]
    memory_values: tuple[Float[AnyArray, "rows length heads head_width"], ...]
    memory_mask: Bool[AnyArray, "rows length"]
    used: Int[AnyArray, ""]


def prefill(
    params: Mapping[str, Any],
    config: EncoderDecoderConfig,
    tokens: Int[Array, "rows length"],
    prompt_length: Int[Array, " rows"],
    *,
    slots: int,
    adapters: Mapping[str, Any] | None = None,
    adapter_scale: float | Float[Array, ""] = 1.0,
    dtype: Any = None,
) -> tuple[Float[Array, "rows width"], CrossCache]:
    """The decoder's hidden state after its start token, and the cache with what it reads.

    Args:
      params: nested dict of arrays.
      config: the encoder-decoder.
      tokens: prompts, padded on the left.
      prompt_length: how many of a row's tokens are real.
      slots: of the cache: what is to be generated and the start token.
      adapters: as in `encoder_decoder.hidden_states`.
      adapter_scale: as in `encoder_decoder.hidden_states`.
      dtype: of the computation and the cache; None is the parameters' own.
    """
    dtype = params["embed"]["embedding"].dtype if dtype is None else dtype
    mask = jnp.arange(tokens.shape[1])[None] >= (tokens.shape[1] - prompt_length)[:, None]
    options = {"adapters": adapters, "adapter_scale": adapter_scale, "dtype": dtype}
    memory = encode(params, config, tokens, mask.astype(jnp.int32), **options)
    updates = _updates(adapters, config)
    rows, heads = tokens.shape[0], (config.heads, config.head_width)

    def of_memory(name: str) -> tuple[Array, ...]:
        return tuple(
            dense(
                memory, layer["cross"][name], own.get("cross", {}).get(name), adapter_scale
            ).reshape(*tokens.shape, *heads)
            for layer, own in zip(_layers(params, config), updates, strict=True)
        )

    empty = jnp.zeros((rows, heads[0], slots, heads[1]), dtype)
    cache = CrossCache(
        keys=(devices.by_rows(empty),) * config.decoder_layers,
        values=(devices.by_rows(empty),) * config.decoder_layers,
        memory_keys=of_memory("k"),
        memory_values=of_memory("v"),
        memory_mask=mask,
        used=jnp.int32(0),
    )
    start = jnp.full(rows, config.start_token, jnp.int32)
    return advance(params, config, cache, start, **options)


def _layers(params: Mapping[str, Any], config: EncoderDecoderConfig) -> list[Any]:
    return layers_of(params["decoder"]["layers"], config.decoder_layers)


def _updates(adapters: Mapping[str, Any] | None, config: EncoderDecoderConfig) -> list[Any]:
    """The decoder's adapters by layer; empty ones where there are none."""
    if adapters is None or "decoder" not in adapters:
        return [{}] * config.decoder_layers
    return layers_of(adapters["decoder"]["layers"], config.decoder_layers)


def advance(
    params: Mapping[str, Any],
    config: EncoderDecoderConfig,
    cache: CrossCache,
    tokens: Int[Array, " rows"],
    *,
    layers: Sequence[Any] | None = None,
    adapters: Mapping[str, Any] | None = None,
    adapter_scale: float | Float[Array, ""] = 1.0,
    dtype: Any = None,
) -> tuple[Float[Array, "rows width"], CrossCache]:
    """The decoder's hidden state after one more token of every row, and the cache after it.

    Args:
      params: nested dict of arrays.
      config: the encoder-decoder.
      cache: of the tokens before; it has a free slot.
      tokens: one for each row.
      layers: of the decoder, cut up, where a loop should not do it anew for each token.
      adapters: as in `prefill`.
      adapter_scale: as in `prefill`.
      dtype: as in `prefill`.
    """
    dtype = params["embed"]["embedding"].dtype if dtype is None else dtype
    stack, updates = params["decoder"], _updates(adapters, config)
    biases = stack["positions"]["embedding"][None]
    place = jnp.arange(cache.keys[0].shape[2])[None]
    x = look_up(params["embed"], tokens[:, None], dtype)
    kept = []

    def normed(y: Array, scale: Mapping[str, Any]) -> Array:
        return rms_norm(y, scale, eps=config.norm_eps)

    def project(y: Array, name: str, layer: Any, own: Any) -> Array:
        out = dense(y, layer[name], own.get(name), adapter_scale)
        return out.reshape(*y.shape[:2], config.heads, config.head_width)

    def put_out(mixed: Array, layer: Any, own: Any) -> Array:
        mixed = mixed.reshape(*mixed.shape[:2], -1)
        return dense(mixed, layer["o"], own.get("o"), adapter_scale)

    for number, layer in enumerate(layers or _layers(params, config)):
        x, own = devices.by_rows(x), updates[number]
        y = normed(x, layer["attention_norm"])
        keys = write(cache.keys[number], project(y, "k", layer, own), cache.used)
        values = write(cache.values[number], project(y, "v", layer, own), cache.used)
        kept.append((keys, values))
        q, here = project(y, "q", layer, own), cache.used[None]
        by_slot = jnp.moveaxis(keys, 2, 1), jnp.moveaxis(values, 2, 1)
        seen = (place <= cache.used).astype(jnp.int32)
        mixed = attend(q, *by_slot, here, seen, biases, config, causal=True)
        x = x + put_out(mixed, layer, own)
        y, cross, own_cross = normed(x, layer["cross_norm"]), layer["cross"], own.get("cross", {})
        memory = cache.memory_keys[number], cache.memory_values[number]
        q, mask = project(y, "q", cross, own_cross), cache.memory_mask.astype(jnp.int32)
        x = x + put_out(
            attend(q, *memory, here, mask, None, config, causal=False), cross, own_cross
        )
        y = normed(x, layer["mlp_norm"])
        x = x + mlp_branch(y, layer, config, adapters=own, scale=adapter_scale)
    keys, values = zip(*kept, strict=True)
    after = CrossCache(
        keys=keys,
        values=values,
        memory_keys=cache.memory_keys,
        memory_values=cache.memory_values,
        memory_mask=cache.memory_mask,
        used=cache.used + 1,
    )
    return normed(x, stack["final_norm"])[:, 0], after
