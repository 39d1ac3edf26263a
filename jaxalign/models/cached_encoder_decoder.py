"""An encoder-decoder one token at a time: the encoder runs once, the decoder keeps a cache."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.models import devices
from jaxalign.models.cached_decoder import layers_of, write
from jaxalign.models.compute import Compute
from jaxalign.models.config import EncoderDecoderConfig
from jaxalign.models.encoder_decoder import attend, encode
from jaxalign.models.layers import dense, look_up, mlp_branch, rms_norm
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
    dtype: Any = None,
) -> tuple[Float[Array, "rows width"], CrossCache]:
    """The decoder's hidden state after its start token, and the cache with what it reads.

    Args:
      params: nested dict of arrays.
      config: the encoder-decoder.
      tokens: prompts, padded on the left.
      prompt_length: how many of a row's tokens are real.
      slots: of the cache: what is to be generated and the start token.
      dtype: of the computation and the cache; None is the parameters' own.
    """
    dtype = params["embed"]["embedding"].dtype if dtype is None else dtype
    mask = jnp.arange(tokens.shape[1])[None] >= (tokens.shape[1] - prompt_length)[:, None]
    memory = encode(params, config, tokens, mask.astype(jnp.int32), compute=Compute(dtype=dtype))
    rows, heads = tokens.shape[0], (config.heads, config.head_width)

    def of_memory(name: str) -> tuple[Array, ...]:
        return tuple(
            dense(memory, layer["cross"][name]).reshape(*tokens.shape, *heads)
            for layer in _layers(params, config)
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
    return advance(params, config, cache, start, dtype=dtype)


def _layers(params: Mapping[str, Any], config: EncoderDecoderConfig) -> list[Any]:
    return layers_of(params["decoder"]["layers"], config.decoder_layers)


def advance(
    params: Mapping[str, Any],
    config: EncoderDecoderConfig,
    cache: CrossCache,
    tokens: Int[Array, " rows"],
    *,
    layers: Sequence[Any] | None = None,
    dtype: Any = None,
) -> tuple[Float[Array, "rows width"], CrossCache]:
    """The decoder's hidden state after one more token of every row, and the cache after it.

    Args:
      params: nested dict of arrays.
      config: the encoder-decoder.
      cache: of the tokens before; it has a free slot.
      tokens: one for each row.
      layers: of the decoder, from `layers_of`, where a loop should not slice them for each token.
      dtype: as in `prefill`.
    """
    dtype = params["embed"]["embedding"].dtype if dtype is None else dtype
    stack = params["decoder"]
    biases = stack["positions"]["embedding"][None]
    place = jnp.arange(cache.keys[0].shape[2])[None]
    x = look_up(params["embed"], tokens[:, None], dtype)
    kept = []

    def normed(y: Array, scale: Mapping[str, Any]) -> Array:
        return rms_norm(y, scale, eps=config.norm_eps)

    def project(y: Array, name: str, layer: Any) -> Array:
        return dense(y, layer[name]).reshape(*y.shape[:2], config.heads, config.head_width)

    def output(mixed: Array, layer: Any) -> Array:
        return dense(mixed.reshape(*mixed.shape[:2], -1), layer["o"])

    for number, layer in enumerate(layers or _layers(params, config)):
        x = devices.by_rows(x)
        y = normed(x, layer["attention_norm"])
        keys = write(cache.keys[number], project(y, "k", layer), cache.used)
        values = write(cache.values[number], project(y, "v", layer), cache.used)
        kept.append((keys, values))
        q, here = project(y, "q", layer), cache.used[None]
        by_slot = jnp.moveaxis(keys, 2, 1), jnp.moveaxis(values, 2, 1)
        seen = (place <= cache.used).astype(jnp.int32)
        mixed = attend(q, *by_slot, here, seen, biases, config, causal=True)
        x = x + output(mixed, layer)
        y, cross = normed(x, layer["cross_norm"]), layer["cross"]
        memory = cache.memory_keys[number], cache.memory_values[number]
        q, mask = project(y, "q", cross), cache.memory_mask.astype(jnp.int32)
        x = x + output(attend(q, *memory, here, mask, None, config, causal=False), cross)
        x = x + mlp_branch(normed(x, layer["mlp_norm"]), layer, config)
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
