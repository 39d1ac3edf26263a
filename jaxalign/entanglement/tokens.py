"""Inner products of the gradients of single tokens within a pair."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.models import DecoderConfig, decoder
from jaxalign.models.compute import Compute
from jaxalign.models.config import ModelConfig
from jaxalign.models.layers import softcap
from jaxalign.models.lora import with_adapters
from jaxalign.models.precision import precision
from jaxalign.models.responses import predicting_positions, response_states
from jaxalign.records import record
from jaxalign.rows import ResponseRows

HIGHEST = jax.lax.Precision.HIGHEST

CHUNK_NUMBERS = 2**26
"""Default size of the gradients of a chunk, in numbers: 256 MiB."""


BLOCKED = Compute(attention="blocked", dtype=jnp.float32)
"""The attention and the products that can be differentiated in forward mode."""


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
    pair: ResponseRows,
    *,
    adapters: Mapping[str, Any] | None = None,
    adapter_scale: float = 1.0,
    chunk: int | None = None,
) -> TokenGeometry:
    r"""The matrix of gradient inner products between chosen and rejected tokens.

    .. math:: M_{tu} = \langle \nabla_\theta \log\pi(y_{w,t}),
              \nabla_\theta \log\pi(y_{l,u}) \rangle, \qquad
              \sum_{tu} M_{tu} = \langle g_w, g_l \rangle

    The gradients are over all trained parameters. A decoder is traversed backwards once, layer by
    layer: a layer's gradients of the chosen tokens are pushed forward through the derivative of the
    rejected row in that layer, and multiplied with the rejected tokens' cotangents; embeddings are
    in closed form. For other models, a chosen token's whole gradient is pushed forward through the
    derivative of all rejected log-probs. Only the gradients of a chunk of tokens are in memory.

    Args:
      params: nested dict of arrays.
      config: `DecoderConfig` or `EncoderDecoderConfig`.
      pair: its two rows, chosen and rejected.
      adapters: low-rank updates; if given, they alone are the trained parameters.
      adapter_scale: factor on the updates, alpha / rank.
      chunk: tokens per chunk; None: as many as fit in 256 MiB.

    Returns:
      [response, response] in float32.

    References:
      The heat maps of Yuan et al., 2024, arXiv:2410.13828, figure 4b.
    """
    if isinstance(config, DecoderConfig):
        return _by_layers(params, config, pair, adapters, adapter_scale, chunk)
    return _by_whole_gradients(params, config, pair, adapters, adapter_scale, chunk)


def _by_whole_gradients(params, config, pair, adapters, adapter_scale, chunk) -> TokenGeometry:
    """Whole gradients of one chosen token after the other, for any architecture."""
    trained = params if adapters is None else adapters
    size = sum(x.size for x in jax.tree.leaves(trained))
    chunk = max(1, CHUNK_NUMBERS // size) if chunk is None else chunk

    def side(row: int) -> Callable[[Any], Float[Array, " response"]]:
        def log_probs(trained: Any) -> Float[Array, " response"]:
            policy = trained
            if adapters is not None:
                policy = with_adapters(params, trained, adapter_scale)
            return _log_probs(policy, config, jax.tree.map(lambda x: x[row : row + 1], pair))[0]

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


def _by_layers(params, config, pair, adapters, adapter_scale, chunk) -> TokenGeometry:
    """Layer by layer, from the last to the first, for decoders."""
    tokens, length = jnp.asarray(pair.tokens), pair.response_tokens.shape[1]
    policy = params if adapters is None else with_adapters(params, adapters, adapter_scale)
    x, block, inputs = decoder.begin_layers(policy, config, tokens, compute=BLOCKED)
    trained = params["layers"] if adapters is None else adapters["layers"]
    size = sum(leaf.size for leaf in jax.tree.leaves(trained)) // config.layers
    chunk = max(1, CHUNK_NUMBERS // size) if chunk is None else chunk

    def through(x: Array, inputs: Any) -> tuple[Array, Array]:
        return block(x, inputs)[0], x

    last, entered = jax.lax.scan(through, x, inputs)
    positions = predicting_positions(jax.tree.map(jnp.asarray, pair))
    hidden = decoder.norm(last, params["final_norm"], config)
    hidden = jnp.take_along_axis(hidden, positions[..., None], axis=1)
    output_gradient = _output_gradients(params, config, pair, hidden)
    kernel, bias = decoder.unembedding(params, config)
    back = jnp.matmul(output_gradient, kernel.T.astype(jnp.float32), precision=HIGHEST)

    def batched(of_token: Callable[[Array], Any], cotangents: Array) -> Any:
        # Grouped products of accelerators have no batches.
        size = None if config.experts is not None else min(chunk, length)
        return jax.lax.map(of_token, cotangents, batch_size=size)

    def of_norm(side: int) -> tuple[Array, Any]:
        """Cotangents of the last layer's states for each token, and the final norm's gradients."""
        _, backward = jax.vjp(
            lambda x, scales: decoder.norm(x, scales, config),
            last[side : side + 1],
            params["final_norm"],
        )

        def of_token(inputs: tuple[Array, Array]) -> Any:
            position, cotangent = inputs
            rows = jnp.zeros(last[:1].shape).at[0, position].set(cotangent)
            return backward(rows.astype(last.dtype))

        return jax.lax.map(of_token, (positions[side], back[side]))

    def meet(chosen: Any, rejected: Any) -> Array:
        """Inner product of two trees of gradients."""
        products = jax.tree.map(lambda x, y: jnp.sum(x.astype(jnp.float32) * y), chosen, rejected)
        return sum(jax.tree.leaves(products), jnp.zeros(()))

    def layer(carry: Any, inputs: Any) -> tuple[Any, None]:
        (chosen, rejected), sums = carry
        entered, (layer_params, kind), trained = inputs

        def run(trained: Any, x: Array) -> Array:
            own = trained
            if adapters is not None:
                own = with_adapters(layer_params, trained, adapter_scale)
            return block(x, (own, kind))[0]

        rows = entered[:1], entered[1:]
        _, pull_chosen = jax.vjp(run, trained, rows[0])
        _, pull_rejected = jax.vjp(run, trained, rows[1])
        _, push = jax.linearize(lambda trained: run(trained, rows[1]), trained)

        def of_chosen(cotangent: Array) -> tuple[Array, Array, Array]:
            gradient, before = pull_chosen(cotangent)
            moved = push(gradient)
            inner = jnp.tensordot(rejected, moved, axes=moved.ndim, precision=HIGHEST)
            return before, meet(gradient, gradient), inner

        def of_rejected(cotangent: Array) -> tuple[Array, Array]:
            gradient, before = pull_rejected(cotangent)
            return before, meet(gradient, gradient)

        chosen, own_chosen, inner = batched(of_chosen, chosen)
        rejected, own_rejected = batched(of_rejected, rejected)
        more = TokenGeometry(inner=inner, chosen=own_chosen, rejected=own_rejected)
        return ((chosen, rejected), jax.tree.map(jnp.add, sums, more)), None

    (chosen, scales_chosen), (rejected, scales_rejected) = of_norm(0), of_norm(1)
    sums = jax.tree.map(jnp.zeros_like, _products(output_gradient))
    carry = (chosen, rejected), sums
    (firsts, sums), _ = jax.lax.scan(layer, carry, (entered, inputs, trained), reverse=True)
    if adapters is not None:
        return sums
    scales = [scales_chosen, scales_rejected]
    flat = [
        jnp.concatenate([x.reshape(length, -1) for x in jax.tree.leaves(one)], axis=1)
        for one in scales
    ]
    parts = [
        sums,
        _products(flat),
        _of_embeddings(params, config, pair, firsts, hidden, output_gradient),
    ]
    if bias is not None:
        parts.append(_products(output_gradient))
    return jax.tree.map(lambda *xs: sum(xs), *parts)


def _of_embeddings(params, config, pair, firsts, hidden, output_gradient) -> TokenGeometry:
    """Contribution of embedding, positions and unembedding, in closed form.

    A token's gradient of the unembedding is the outer product of its output gradient and its hidden
    state; that of the embedding is the cotangent of the first layer's input, summed by id.
    """
    tokens = jnp.asarray(pair.tokens)
    firsts = [x[:, 0].astype(jnp.float32) for x in firsts]  # [response, length, width]
    factor = 1.0 if config.embedding_scale is None else config.embedding_scale
    entered = [factor * x for x in firsts]

    def of_embedding(one: int, other: int) -> Array:
        """[tokens of one, tokens of other], or of one with themselves on the diagonal."""
        same = (tokens[one][:, None] == tokens[other][None]).astype(jnp.float32)
        gathered = jnp.einsum("pq,tpd->tqd", same, entered[one], precision=HIGHEST)
        return jnp.einsum("tqd,uqd->tu", gathered, entered[other], precision=HIGHEST)

    def crossed(one: int, other: int) -> Array:
        """Unembedding gradients of one side with embedding gradients of the other."""
        at_ids = output_gradient[one][:, tokens[other]]  # [tokens of one, length]
        dots = jnp.einsum("td,uqd->tuq", hidden[one], entered[other], precision=HIGHEST)
        return jnp.einsum("tq,tuq->tu", at_ids, dots, precision=HIGHEST)

    def total(one: int, other: int) -> Array:
        states = jnp.matmul(hidden[one].astype(jnp.float32), hidden[other].T, precision=HIGHEST)
        gradients = jnp.matmul(output_gradient[one], output_gradient[other].T, precision=HIGHEST)
        out = states * gradients + of_embedding(one, other)
        return out + crossed(one, other) + crossed(other, one).T if config.tied else out

    geometry = TokenGeometry(
        inner=total(0, 1), chosen=jnp.diagonal(total(0, 0)), rejected=jnp.diagonal(total(1, 1))
    )
    if config.position_kind != "learned":
        return geometry
    of_positions = _products([x.reshape(x.shape[0], -1) for x in firsts])
    return jax.tree.map(jnp.add, geometry, of_positions)


def _products(x: Any) -> TokenGeometry:
    """Inner products of rows [tokens, ...] of the two sides, and their squared norms."""
    own = [jnp.sum(jnp.square(side), axis=-1) for side in x]
    return TokenGeometry(
        inner=jnp.matmul(x[0], x[1].T, precision=HIGHEST), chosen=own[0], rejected=own[1]
    )


def last_layer_geometry(
    params: Mapping[str, Any], config: ModelConfig, pair: ResponseRows
) -> TokenGeometry:
    r"""`token_geometry` of the unembedding alone, in closed form from one forward pass.

    .. math:: M_{tu} = (\delta_t \cdot \delta_u) \, (h_t \cdot h_u), \quad
              \delta = f'(z) \odot (e_y - \pi)

    with the hidden states h that the logits z are made of, and f' = 1 except for models that scale
    or cap their logits. A tied embedding only counts as unembedding.

    Args:
      params: nested dict of arrays.
      config: `DecoderConfig` or `EncoderDecoderConfig`.
      pair: its two rows, chosen and rejected.

    Returns:
      [response, response] in float32.
    """
    hidden = _hidden(params, config, pair)
    output_gradient = _output_gradients(params, config, pair, hidden)
    return jax.tree.map(
        jnp.multiply, _products(hidden.astype(jnp.float32)), _products(output_gradient)
    )


def _hidden(params, config, pair) -> Float[Array, "rows response width"]:
    """Hidden states that predict the responses, differentiable in either direction."""
    rows = jax.tree.map(jnp.asarray, pair)
    return response_states(params, config, rows, compute=BLOCKED)


def _logits(params, config, hidden):
    """Float32 logits, all of one pair in memory, and the derivative of their form."""
    kernel, bias = decoder.unembedding(params, config)
    z = jnp.matmul(
        hidden,
        kernel.astype(hidden.dtype),
        precision=precision(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    if bias is not None:
        z = z + bias.astype(jnp.float32)[None, None]
    derivative = 1.0
    if config.logit_scale is not None:
        z, derivative = z * config.logit_scale, config.logit_scale
    z = softcap(z, config.logit_softcap)
    if config.logit_softcap is not None:
        derivative = derivative * (1.0 - jnp.square(z / config.logit_softcap))
    return z, derivative


def _log_probs(params, config, pair) -> Float[Array, "rows response"]:
    z, _ = _logits(params, config, _hidden(params, config, pair))
    targets = jnp.asarray(pair.response_tokens)
    picked = jnp.take_along_axis(jax.nn.log_softmax(z), targets[..., None], axis=-1)[..., 0]
    real = jnp.arange(targets.shape[1])[None] < jnp.asarray(pair.response_length)[:, None]
    return jnp.where(real, picked, 0.0)


def _output_gradients(params, config, pair, hidden) -> Float[Array, "rows response vocabulary"]:
    """Derivatives of the log-probs with respect to the raw logits; 0 at padding."""
    z, form = _logits(params, config, hidden)
    hit = jax.nn.one_hot(jnp.asarray(pair.response_tokens), z.shape[-1])
    real = jnp.arange(z.shape[1])[None] < jnp.asarray(pair.response_length)[:, None]
    return jnp.where(real[..., None], form * (hit - jax.nn.softmax(z)), 0.0)
