"""Which tokens pull on which: inner products of single tokens' gradients within a pair."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign.models import DecoderConfig, decoder, encoder_decoder
from jaxalign.models.layers import softcap
from jaxalign.models.precision import precision
from jaxalign.models.responses import response_states
from jaxalign.records import AnyArray, record

CHUNK_NUMBERS = 2**26
"""Numbers that a chunk's gradients hold together where the caller does not say: 256 MiB."""


@record
class PairTokens:
    """One pair; rows are chosen and rejected.

    Attributes:
      tokens: prompt and response behind one another, padded on the right.
      prompt_length: how many of `tokens` are prompt.
      response_tokens: responses, padded on the right.
      response_length: how many of these are real.
    """

    tokens: Int[AnyArray, "2 length"]
    prompt_length: Int[AnyArray, "2"]
    response_tokens: Int[AnyArray, "2 response"]
    response_length: Int[AnyArray, "2"]


@record
class TokenGeometry:
    """Inner products of the gradients of single tokens' log-probs; 0 at padding.

    Attributes:
      inner: of every chosen with every rejected token.
      chosen: squared norms of the chosen tokens' gradients.
      rejected: squared norms of the rejected tokens' gradients.
    """

    inner: Float[Array, "chosen rejected"]
    chosen: Float[Array, " chosen"]
    rejected: Float[Array, " rejected"]

    @property
    def cosine(self) -> Float[Array, "chosen rejected"]:
        """Cosines; NaN at padding and where a gradient is zero."""
        norms = jnp.sqrt(self.chosen)[:, None] * jnp.sqrt(self.rejected)[None, :]
        return self.inner / jnp.where(norms > 0, norms, jnp.nan)


def token_geometry(
    params: Mapping[str, Any],
    config: Any,
    pair: PairTokens,
    *,
    adapters: Mapping[str, Any] | None = None,
    adapter_scale: float = 1.0,
    chunk: int | None = None,
) -> TokenGeometry:
    r"""The matrix of gradient inner products between chosen and rejected tokens.

    .. math:: M_{tu} = \langle \nabla_\theta \log\pi(y_{w,t}),
              \nabla_\theta \log\pi(y_{l,u}) \rangle, \qquad
              \sum_{tu} M_{tu} = \langle g_w, g_l \rangle

    Over all trained parameters. A chosen token's gradient (one backward pass) is pushed through the
    derivative of all rejected log-probs at once (one forward-mode pass), a chunk of tokens at a
    time: a chunk's gradients are in memory and never all of them.

    Args:
      params: nested dict of arrays.
      config: `DecoderConfig` or `EncoderDecoderConfig`.
      pair: one pair.
      adapters: low-rank updates; if given, they alone are the trained parameters.
      adapter_scale: factor on the updates, alpha / rank.
      chunk: tokens at a time; None: as many as fit into 256 MiB.

    Returns:
      [response, response] in float32.

    References:
      The heat maps of Yuan et al., 2024, arXiv:2410.13828, figure 4b.
    """
    trained = params if adapters is None else adapters
    size = sum(x.size for x in jax.tree.leaves(trained))
    chunk = max(1, CHUNK_NUMBERS // size) if chunk is None else chunk

    def side(row: int) -> Callable[[Any], Float[Array, " response"]]:
        def log_probs(trained: Any) -> Float[Array, " response"]:
            own = {"params": trained} if adapters is None else {"params": params}
            if adapters is not None:
                own |= {"adapters": trained, "adapter_scale": adapter_scale}
            return _log_probs(config, jax.tree.map(lambda x: x[row : row + 1], pair), **own)[0]

        return log_probs

    def rows(row: int, push: Callable[[Any], Array] | None) -> tuple[Array, Array]:
        _, backward = jax.vjp(side(row), trained)

        def of_token(cotangent: Array) -> tuple[Array, Array]:
            gradient = backward(cotangent)[0]
            norm = jnp.stack([jnp.sum(jnp.square(x)) for x in jax.tree.leaves(gradient)]).sum()
            return norm, push(gradient) if push is not None else jnp.zeros(())

        length = pair.response_tokens.shape[1]
        return jax.lax.map(of_token, jnp.eye(length), batch_size=min(chunk, length))

    _, push = jax.linearize(side(1), trained)
    chosen, inner = rows(0, push)
    rejected, _ = rows(1, None)
    return TokenGeometry(inner=inner, chosen=chosen, rejected=rejected)


def last_layer_geometry(params: Mapping[str, Any], config: Any, pair: PairTokens) -> TokenGeometry:
    r"""`token_geometry` of the unembedding alone, in closed form from one forward pass.

    .. math:: M_{tu} = (\delta_t \cdot \delta_u) \, (h_t \cdot h_u), \quad
              \delta = f'(z) \odot (e_y - \pi)

    with the hidden states h that the logits z are made of, and f' = 1 but for models that scale or
    cap their logits. A tied embedding counts in its role as unembedding.

    Args:
      params: nested dict of arrays.
      config: `DecoderConfig` or `EncoderDecoderConfig`.
      pair: one pair.

    Returns:
      [response, response] in float32.
    """
    hidden, slope = _states_and_slopes(params, config, pair)
    real = jnp.arange(hidden.shape[1])[None] < jnp.asarray(pair.response_length)[:, None]
    slope = jnp.where(real[..., None], slope, 0.0)

    def products(x: Array) -> tuple[Array, Array, Array]:
        own = jnp.sum(jnp.square(x), axis=-1)
        return jnp.matmul(x[0], x[1].T, precision=jax.lax.Precision.HIGHEST), own[0], own[1]

    of_hidden, of_slope = products(hidden.astype(jnp.float32)), products(slope)
    inner, chosen, rejected = (x * y for x, y in zip(of_hidden, of_slope, strict=True))
    return TokenGeometry(inner=inner, chosen=chosen, rejected=rejected)


def _logits(params, config, pair, **adapters):
    """Hidden states and float32 logits that predict the responses, and their form's derivative.

    With all logits of one pair in memory, and differentiable in either direction.
    """
    if isinstance(config, DecoderConfig):
        adapters = adapters | {"attention_kind": "blocked"}
    rows = (pair.tokens, pair.prompt_length, pair.response_tokens)
    hidden = response_states(params, config, *map(jnp.asarray, rows), **adapters)
    room: Any = decoder if isinstance(config, DecoderConfig) else encoder_decoder
    kernel, bias = room.unembedding(params, config)
    z = jnp.matmul(
        hidden,
        kernel.astype(hidden.dtype),
        precision=precision(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    if bias is not None:
        z = z + bias.astype(jnp.float32)[None, None]
    slope = 1.0
    if config.logit_scale is not None:
        z, slope = z * config.logit_scale, config.logit_scale
    z = softcap(z, config.logit_softcap)
    if config.logit_softcap is not None:
        slope = slope * (1.0 - jnp.square(z / config.logit_softcap))
    return hidden, z, slope


def _log_probs(config, pair, *, params, **adapters) -> Float[Array, "rows response"]:
    _, z, _ = _logits(params, config, pair, **adapters)
    targets = jnp.asarray(pair.response_tokens)
    picked = jnp.take_along_axis(jax.nn.log_softmax(z), targets[..., None], axis=-1)[..., 0]
    real = jnp.arange(targets.shape[1])[None] < jnp.asarray(pair.response_length)[:, None]
    return jnp.where(real, picked, 0.0)


def _states_and_slopes(params, config, pair) -> tuple[Array, Array]:
    hidden, z, form = _logits(params, config, pair)
    hit = jax.nn.one_hot(jnp.asarray(pair.response_tokens), z.shape[-1])
    return hidden, form * (hit - jax.nn.softmax(z))
