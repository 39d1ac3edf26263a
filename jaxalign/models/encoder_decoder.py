"""The shared encoder-decoder (T5): parameters as a nested dict, pure functions of them."""

import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign.models import devices
from jaxalign.models.compute import Compute
from jaxalign.models.config import EncoderDecoderConfig
from jaxalign.models.decoder import unembed, unembedding
from jaxalign.models.layers import dense, look_up, mlp_branch, rms_norm
from jaxalign.models.module import Model
from jaxalign.models.precision import precision
from jaxalign.models.probes import spread


def parameter_shapes(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The shape of every parameter, in the nested dict's own form."""
    width, inner = config.width, config.heads * config.head_width

    def attention(layers: int) -> dict[str, Any]:
        kernels = {name: {"kernel": (layers, width, inner)} for name in "qkv"}
        return kernels | {"o": {"kernel": (layers, inner, width)}}

    def stack(layers: int, *, crosses: bool) -> dict[str, Any]:
        parts: dict[str, Any] = {
            "attention_norm": {"scale": (layers, width)},
            **attention(layers),
            "mlp_norm": {"scale": (layers, width)},
            "up": {"kernel": (layers, width, config.mlp_width)},
            "down": {"kernel": (layers, config.mlp_width, width)},
        }
        if config.gated:
            parts["gate"] = {"kernel": (layers, width, config.mlp_width)}
        if crosses:
            parts |= {"cross_norm": {"scale": (layers, width)}, "cross": attention(layers)}
        return {
            "layers": parts,
            "positions": {"embedding": (config.relative_buckets, config.heads)},
            "final_norm": {"scale": (width,)},
        }

    shapes: dict[str, Any] = {
        "embed": {"embedding": (config.vocab_size, width)},
        "encoder": stack(config.layers, crosses=False),
        "decoder": stack(config.decoder_layers, crosses=True),
    }
    if not config.tied:
        shapes["unembed"] = {"kernel": (width, config.vocab_size)}
    return shapes


def init_params(config: EncoderDecoderConfig, key: jax.Array, *, dtype: Any = jnp.float32) -> dict:
    """Random parameters of T5's own scales: small queries, since scores have no factor.

    Standard deviations times `initializer_factor`: embedding 1; queries (width head_width) ** -0.5;
    every other matrix (its inputs) ** -0.5; distances and the unembedding width ** -0.5.

    Args:
      config: the encoder-decoder.
      key: one PRNG key.
      dtype: of the parameters.

    Returns:
      The nested dict of arrays that `parameter_shapes` describes.
    """

    def leaf(path, shape):
        names = [entry.key for entry in path]
        if names[-1] == "scale":
            return jnp.ones(shape, dtype)
        scale = {
            "embed": 1.0,
            "positions": config.width**-0.5,
            "q": (config.width * config.head_width) ** -0.5,
        }.get(names[-2], shape[-2] ** -0.5)
        own = jax.random.fold_in(key, zlib.crc32("/".join(names).encode()))
        drawn = jax.random.normal(own, shape, jnp.float32)
        return (config.initializer_factor * scale * drawn).astype(dtype)

    shapes = parameter_shapes(config)
    return jax.tree_util.tree_map_with_path(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def relative_bucket(
    distance: Int[Array, "..."], *, buckets: int, reach: int, both_ways: bool
) -> Int[Array, "..."]:
    r"""The bucket of the distance between a key and a query.

    Of n buckets (half of them for either direction where both are seen), the first n/2 hold one
    distance d each and the others grow geometrically up to `reach`:

    .. math:: \lfloor n/2 \rfloor + \Bigl\lfloor \frac{\log (d / \lfloor n/2 \rfloor)}
              {\log (\text{reach} / \lfloor n/2 \rfloor)} \lceil n/2 \rceil \Bigr\rfloor

    Args:
      distance: position of the key minus position of the query.
      buckets: number of buckets.
      reach: distances from this one on share the last bucket.
      both_ways: whether keys after the query are seen (encoder).

    Returns:
      Numbers in [0, buckets). Raffel et al., 2020, arXiv:1910.10683, section 2.1.
    """
    first = jnp.zeros_like(distance)
    if both_ways:
        buckets //= 2
        first = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
    grown = exact + (ratio / math.log(reach / exact) * (buckets - exact)).astype(jnp.int32)
    return first + jnp.where(distance < exact, distance, jnp.minimum(grown, buckets - 1))


def attend(
    q: Float[Array, "batch queries heads head_width"],
    k: Float[Array, "batch keys heads head_width"],
    v: Float[Array, "batch keys heads head_width"],
    q_positions: Int[Array, " queries"],
    key_mask: Array | None,
    biases: Array | None,
    config: EncoderDecoderConfig,
    *,
    causal: bool,
) -> Float[Array, "batch queries heads head_width"]:
    """Attention with learned distances added to the scores; softmax in float32.

    Args:
      q: queries.
      k: keys, from position 0 on.
      v: values.
      q_positions: positions of the queries.
      key_mask: [batch or 1, keys], nonzero at keys that are seen; None: all.
      biases: [batch or 1, buckets, heads], added to the scores by distance; None: nothing.
      config: the encoder-decoder.
      causal: keys after a query are not seen.
    """
    at = precision(q.dtype)
    scores = jnp.einsum("bqhd,bshd->bhqs", q, k, precision=at, preferred_element_type=jnp.float32)
    distance = jnp.arange(k.shape[1])[None] - q_positions[:, None]
    if biases is not None:
        bucket = relative_bucket(
            distance,
            buckets=config.relative_buckets,
            reach=config.relative_distance,
            both_ways=not causal,
        )
        learned = jnp.take(biases.astype(jnp.float32), bucket, axis=1)
        scores = scores + jnp.moveaxis(learned, -1, 1)
    seen = jnp.ones((1, *distance.shape), bool) if key_mask is None else key_mask[:, None, :] != 0
    if causal:
        seen = seen & (distance <= 0)[None]
    scores = jnp.where(seen[:, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bhqs,bshd->bqhd", weights, v, precision=at)


def _attention(x, memory, layer, key_mask, biases, config, *, causal, block=512):
    """Multi-head attention of `x` over `memory`; long inputs one block of queries at a time."""
    batch, length, _ = x.shape

    def project(name, inputs):
        y = dense(inputs, layer[name])
        return y.reshape(batch, inputs.shape[1], config.heads, config.head_width)

    q, k, v = project("q", x), project("k", memory), project("v", memory)
    mix = functools.partial(attend, config=config, causal=causal)
    if length <= block:
        mixed = mix(q, k, v, jnp.arange(length), key_mask, biases)
    else:
        blocks = -(-length // block)
        q = jnp.pad(q, ((0, 0), (0, blocks * block - length), (0, 0), (0, 0)))
        q = jnp.moveaxis(q.reshape(batch, blocks, block, config.heads, config.head_width), 1, 0)

        @jax.checkpoint
        def step(_, inputs):
            number, queries = inputs
            places = number * block + jnp.arange(block)
            return None, mix(queries, k, v, places, key_mask, biases)

        _, mixed = jax.lax.scan(step, None, (jnp.arange(blocks), q))
        mixed = jnp.moveaxis(mixed, 0, 1).reshape(batch, blocks * block, -1)[:, :length]
    return dense(mixed.reshape(batch, length, -1), layer["o"])


def _stack(x, stack, config, compute, *, mask, causal, memory=None, memory_mask=None):
    """The layers of one stack under `jax.lax.scan`, and its final norm."""
    biases, probe = stack["positions"]["embedding"], stack["positions"].get("probe")
    rows = 1 if probe is None else x.shape[0]
    biases = spread(biases, (rows, *biases.shape), biases.dtype, probe)

    def norm(y, params):
        return rms_norm(y, params, eps=config.norm_eps)

    def block(x, layer):
        x = devices.by_rows(x)
        y = norm(x, layer["attention_norm"])
        x = x + _attention(y, y, layer, mask, biases, config, causal=causal)
        if memory is not None:
            y = norm(x, layer["cross_norm"])
            seen = memory_mask, None
            x = x + _attention(y, memory, layer["cross"], *seen, config, causal=False)
        y = norm(x, layer["mlp_norm"])
        return x + mlp_branch(y, layer, config), None

    x, _ = jax.lax.scan(compute.checkpoint(block), x, stack["layers"])
    return norm(devices.by_rows(x), stack["final_norm"])


def hidden_states(
    params: Mapping[str, Any],
    config: EncoderDecoderConfig,
    tokens: Int[Array, "batch length"],
    decoder_tokens: Int[Array, "batch response"],
    *,
    attention_mask: Array | None = None,
    decoder_attention_mask: Array | None = None,
    compute: Compute = Compute(),
) -> Float[Array, "batch response width"]:
    """The decoder's last hidden states, after the final norm; layers run under `jax.lax.scan`.

    Args:
      params: nested dict of arrays, as `init_params` makes it; with adapters if wanted
        (`lora.with_adapters`).
      config: the encoder-decoder.
      tokens: what the encoder reads, [batch, length].
      decoder_tokens: what the decoder reads, [batch, response], the start token first.
      attention_mask: [batch, length], nonzero at the encoder's real tokens.
      decoder_attention_mask: [batch, response], nonzero at real tokens; padding on the right
        needs none, since causality hides it.
      compute: precision and memory.

    Returns:
      [batch, response, width] in the computation's dtype.

    Raises:
      UserError: if `remat` is unknown.
    """
    ids = jnp.concatenate([tokens, decoder_tokens], axis=1)
    x, length = look_up(params["embed"], ids, compute.dtype_of(params)), tokens.shape[1]
    read = x[:, :length]
    memory = _stack(read, params["encoder"], config, compute, mask=attention_mask, causal=False)
    return _stack(
        x[:, length:],
        params["decoder"],
        config,
        compute,
        mask=decoder_attention_mask,
        causal=True,
        memory=memory,
        memory_mask=attention_mask,
    )


def encode(
    params: Mapping[str, Any],
    config: EncoderDecoderConfig,
    tokens: Int[Array, "batch length"],
    mask: Int[Array, "batch length"],
    *,
    compute: Compute = Compute(),
) -> Float[Array, "batch length width"]:
    """The encoder's last states, which the decoder attends to.

    Args:
      params: nested dict of arrays.
      config: the encoder-decoder.
      tokens: the prompts.
      mask: nonzero at real tokens.
      compute: as in `hidden_states`.
    """
    x = look_up(params["embed"], tokens, compute.dtype_of(params))
    return _stack(x, params["encoder"], config, compute, mask=mask, causal=False)


def response_states(
    params: Mapping[str, Any],
    config: EncoderDecoderConfig,
    tokens: Int[Array, "batch length"],
    prompt_length: Int[Array, " batch"],
    response_tokens: Int[Array, "batch response"],
    *,
    compute: Compute = Compute(),
) -> Float[Array, "batch response width"]:
    """Hidden states that predict the response: the decoder reads the start token and the response.

    Args:
      params: nested dict of arrays.
      config: the encoder-decoder.
      tokens: the encoder reads each row's first `prompt_length` tokens.
      prompt_length: [batch].
      response_tokens: [batch, response], padded on the right.
      compute: as in `hidden_states`.
    """
    mask = (jnp.arange(tokens.shape[1])[None] < prompt_length[:, None]).astype(jnp.int32)
    inputs = decoder_inputs(config, response_tokens)
    return hidden_states(params, config, tokens, inputs, attention_mask=mask, compute=compute)


def decoder_inputs(
    config: EncoderDecoderConfig, response_tokens: Int[Array, "batch response"]
) -> Int[Array, "batch response"]:
    """What the decoder reads to predict a response: the start token, and all but its last."""
    start = jnp.full_like(response_tokens[:, :1], config.start_token)
    return jnp.concatenate([start, response_tokens[:, :-1]], axis=1)


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _compiled_logits(params, config, tokens, decoder_tokens, mask, decoder_mask, compute):
    masks = {"attention_mask": mask, "decoder_attention_mask": decoder_mask}
    hidden = hidden_states(params, config, tokens, decoder_tokens, **masks, compute=compute)
    return unembed(hidden, config, *unembedding(params, config))


class EncoderDecoder(Model):
    """An encoder-decoder with its parameters."""

    def __call__(
        self,
        tokens,
        attention_mask=None,
        *,
        decoder_tokens,
        decoder_attention_mask=None,
        remat: str = "none",
    ) -> Float[Array, "batch response vocabulary"]:
        """Float32 logits of the decoder, [batch, response, vocabulary].

        Args:
          tokens: the encoder's, [batch, length] int32.
          attention_mask: [batch, length], nonzero at real tokens.
          decoder_tokens: the decoder's, [batch, response] int32, the start token first.
          decoder_attention_mask: [batch, response], nonzero at real tokens.
          remat: what a backward pass recomputes.
        """
        arrays = [
            None if x is None else jnp.asarray(x)
            for x in (tokens, decoder_tokens, attention_mask, decoder_attention_mask)
        ]
        compute = Compute(remat=remat, dtype=self.dtype)
        return _compiled_logits(self.params, self.config, *arrays, compute=compute)
