"""Token log-probs, entropies and divergences from hidden states, without an array of logits.

Everything runs over blocks of tokens and of the vocabulary, forward and backward, in float32.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign.models.layers import precision
from jaxalign.records import record

TOKEN_BLOCK = 1024
BLOCK_LOGITS = 2**22  # logits of one block: 16 MiB in float32
NEVER = -1e30  # the logit of a column that does not count: finite, so that 0 * NEVER is 0


@record
class TokenStatistics:
    """What a distribution over the vocabulary says of one token, in nats.

    Attributes:
      log_prob: log-prob of the target token.
      entropy: of the distribution that the target is drawn from.
    """

    log_prob: Float[Array, " tokens"]
    entropy: Float[Array, " tokens"]


@record
class ResponseLogProbs:
    """Log-probs of responses' tokens and the policy's entropy there, 0 at padding, in nats."""

    log_prob: Float[Array, "batch response"]
    entropy: Float[Array, "batch response"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """The static part of a blocked computation: sizes of blocks and the form of the logits."""

    tokens: int
    vocabulary: int
    token_blocks: int
    vocab_blocks: int
    vocab_block: int
    softcap: float | None
    scale: float | None

    def first_columns(self) -> Array:
        """First column of each vocabulary block that no block before it has treated."""
        return jnp.arange(self.vocab_blocks, dtype=jnp.int32) * self.vocab_block

    def start(self, first: Array) -> Array:
        """Where a block is read: the last one steps back so that it ends with the vocabulary."""
        return jnp.minimum(first, self.vocabulary - self.vocab_block)

    def split(self, x: Array) -> Array:
        """[tokens, ...] -> [token_blocks, size, ...], every block strewn over all of the tokens.

        So a token axis that is sharded over devices stays sharded within every block.
        """
        size = -(-self.tokens // self.token_blocks)
        missing = size * self.token_blocks - self.tokens
        if missing:
            x = jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1))
        return jnp.moveaxis(x.reshape(size, self.token_blocks, *x.shape[1:]), 1, 0)

    def join(self, x: Array) -> Array:
        """The reverse of `split`."""
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(-1, *x.shape[2:])[: self.tokens]


def _plan(tokens, vocabulary, token_block, vocab_block, softcap, scale) -> _Plan:
    for name, value in (("token_block", token_block), ("vocab_block", vocab_block)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value} is not positive")
    token_blocks = max(1, -(-tokens // (token_block or TOKEN_BLOCK)))
    # A divisor of the tokens needs no padding; take the next one if it is not far.
    near = (n for n in range(token_blocks, 2 * token_blocks) if tokens % n == 0)
    token_blocks = next(near, token_blocks)
    if vocab_block is None:
        vocab_block = max(512, BLOCK_LOGITS // max(1, tokens // token_blocks))
    vocab_blocks = -(-vocabulary // vocab_block)
    even = -(-vocabulary // vocab_blocks)
    if vocab_blocks > 1:  # lanes of an accelerator are 128 wide
        even = min(vocabulary, -(-even // 128) * 128) if even > 128 else even
        vocab_blocks = -(-vocabulary // even)
    return _Plan(
        tokens=tokens,
        vocabulary=vocabulary,
        token_blocks=token_blocks,
        vocab_blocks=vocab_blocks,
        vocab_block=even,
        softcap=softcap,
        scale=scale,
    )


def _columns(plan: _Plan, kernel: Array, bias: Array | None, first: Array, dtype: Any):
    """One block of the unembedding, in the dtype of the computation."""
    start = plan.start(first)
    block = jax.lax.dynamic_slice_in_dim(kernel, start, plan.vocab_block, axis=1).astype(dtype)
    if bias is not None:
        bias = jax.lax.dynamic_slice_in_dim(bias, start, plan.vocab_block).astype(jnp.float32)
    return block, bias


def _logits(plan: _Plan, hidden: Array, kernel: Array, bias: Array | None, first: Array) -> Array:
    """Float32 logits of a block of tokens and columns; columns treated before count as never."""
    z = jnp.matmul(
        hidden, kernel, precision=precision(hidden.dtype), preferred_element_type=jnp.float32
    )
    if bias is not None:
        z = z + bias[None]
    if plan.scale is not None:
        z = z * plan.scale
    if plan.softcap is not None:
        z = plan.softcap * jnp.tanh(z / plan.softcap)
    if plan.vocab_blocks * plan.vocab_block > plan.vocabulary:
        column = plan.start(first) + jnp.arange(plan.vocab_block)
        z = jnp.where((column >= first)[None], z, NEVER)
    return z


def _at_targets(plan: _Plan, z: Array, targets: Array, first: Array) -> Array:
    """The logit of each target that lies in this block; 0 for the others."""
    start = plan.start(first)
    inside = (targets >= first) & (targets < start + plan.vocab_block)
    place = jnp.clip(targets - start, 0, plan.vocab_block - 1)
    return jnp.where(inside, jnp.take_along_axis(z, place[:, None], axis=1)[:, 0], 0.0)


def _gradients(plan: _Plan, slope: Any, hidden, kernel, bias, rows):
    """Cotangents of hidden states, kernel and bias from a slope of the logits, block by block.

    Args:
      plan: blocks and the form of the logits.
      slope: (z [size, vocab_block], first, rows of the block, its columns) -> cotangent of z.
      hidden: [tokens, width].
      kernel: [width, vocabulary].
      bias: [vocabulary] or None.
      rows: pytree of [tokens, ...] arrays that the slope reads.
    """
    hiddens, rows = plan.split(hidden), jax.tree.map(plan.split, rows)
    at = precision(hidden.dtype)

    def vocabulary_step(carry, first):
        d_hiddens, d_kernel, d_bias = carry
        block, bias_block = _columns(plan, kernel, bias, first, hidden.dtype)

        def token_step(sums, inputs):
            x, d_x, row = inputs
            z = _logits(plan, x, block, bias_block, first)
            d_z = slope(z, first, row)
            if plan.softcap is not None:
                d_z = d_z * (1.0 - jnp.square(z / plan.softcap))
            if plan.scale is not None:
                d_z = d_z * plan.scale
            d_z, d_bias_block = d_z.astype(x.dtype), jnp.sum(d_z, axis=0)
            d_x = d_x + jnp.matmul(d_z, block.T, precision=at, preferred_element_type=jnp.float32)
            d_block = jnp.matmul(x.T, d_z, precision=at, preferred_element_type=jnp.float32)
            return (sums[0] + d_block, sums[1] + d_bias_block), d_x

        zeros = jnp.zeros(block.shape, jnp.float32), jnp.zeros(block.shape[1], jnp.float32)
        (d_block, d_bias_block), d_hiddens = jax.lax.scan(
            token_step, zeros, (hiddens, d_hiddens, rows)
        )
        start = plan.start(first)
        d_kernel = _add_at(d_kernel, d_block, start, axis=1)
        if bias is not None:
            d_bias = _add_at(d_bias, d_bias_block, start, axis=0)
        return (d_hiddens, d_kernel, d_bias), None

    carry = (
        jnp.zeros(hiddens.shape, jnp.float32),
        jnp.zeros(kernel.shape, jnp.float32),
        None if bias is None else jnp.zeros(bias.shape, jnp.float32),
    )
    (d_hiddens, d_kernel, d_bias), _ = jax.lax.scan(vocabulary_step, carry, plan.first_columns())
    d_hidden = plan.join(d_hiddens).astype(hidden.dtype)
    d_bias = None if bias is None else d_bias.astype(bias.dtype)
    return d_hidden, d_kernel.astype(kernel.dtype), d_bias


def _add_at(whole: Array, part: Array, start: Array, *, axis: int) -> Array:
    old = jax.lax.dynamic_slice_in_dim(whole, start, part.shape[axis], axis=axis)
    return jax.lax.dynamic_update_slice_in_dim(whole, old + part, start, axis=axis)


def _accumulate(state, z: Array, *values: Array):
    """Running maximum, sum of exponentials and sums of exponentials times `value - maximum`.

    Only the first value is measured from the maximum; it must be z itself.
    """
    top, total, *sums = state
    new = jnp.maximum(top, jnp.max(z, axis=1))
    shrink = jnp.exp(top - new)
    weights = jnp.exp(z - new[:, None])
    moved = [shrink * (sums[0] + (top - new) * total)]
    moved[0] = moved[0] + jnp.sum(weights * (z - new[:, None]), axis=1)
    for old, value in zip(sums[1:], values, strict=True):
        moved.append(shrink * old + jnp.sum(weights * value, axis=1))
    return (new, shrink * total + jnp.sum(weights, axis=1), *moved)


def _start_state(plan: _Plan, size: int, sums: int):
    shape = (plan.token_blocks, size)
    return (jnp.full(shape, NEVER), *(jnp.zeros(shape) for _ in range(1 + sums)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _statistics(plan, entropy_gradient, hidden, kernel, bias, targets):
    log_prob, entropy, _ = _statistics_forward(plan, hidden, kernel, bias, targets)
    return log_prob, entropy


def _statistics_forward(plan, hidden, kernel, bias, targets):
    hiddens, target_blocks = plan.split(hidden), plan.split(targets)

    def vocabulary_step(state, first):
        block, bias_block = _columns(plan, kernel, bias, first, hidden.dtype)

        def token_step(_, inputs):
            x, target, sums, found = inputs
            z = _logits(plan, x, block, bias_block, first)
            return None, (_accumulate(sums, z), found + _at_targets(plan, z, target, first))

        _, state = jax.lax.scan(token_step, None, (hiddens, target_blocks, *state))
        return state, None

    state = (_start_state(plan, hiddens.shape[1], 1), jnp.zeros(target_blocks.shape))
    (sums, found), _ = jax.lax.scan(vocabulary_step, state, plan.first_columns())
    top, total, weighted = (plan.join(x) for x in sums)
    log_total = jnp.log(total)
    log_sum = top + log_total
    return plan.join(found) - log_sum, log_total - weighted / total, log_sum


def _statistics_fwd(plan, entropy_gradient, hidden, kernel, bias, targets):
    log_prob, entropy, log_sum = _statistics_forward(plan, hidden, kernel, bias, targets)
    return (log_prob, entropy), (hidden, kernel, bias, targets, log_sum, entropy)


def _statistics_bwd(plan, entropy_gradient, saved, cotangents):
    hidden, kernel, bias, targets, log_sum, entropy = saved
    rows = {"target": targets, "log_sum": log_sum, "by_log_prob": cotangents[0]}
    if entropy_gradient:
        rows |= {"entropy": entropy, "by_entropy": cotangents[1]}

    def slope(z, first, row):
        log_p = z - row["log_sum"][:, None]
        p = jnp.exp(log_p)
        column = plan.start(first) + jnp.arange(plan.vocab_block)
        hit = (column[None] == row["target"][:, None]) & (column >= first)[None]
        d_z = jnp.where(hit, 1.0 - p, -p) * row["by_log_prob"][:, None]
        if entropy_gradient:
            d_z = d_z - p * (log_p + row["entropy"][:, None]) * row["by_entropy"][:, None]
        return d_z

    return *_gradients(plan, slope, hidden, kernel, bias, rows), None


_statistics.defvjp(_statistics_fwd, _statistics_bwd)


def token_log_probs(
    hidden: Float[Array, "tokens width"],
    kernel: Float[Array, "width vocabulary"],
    targets: Int[Array, " tokens"],
    *,
    bias: Float[Array, " vocabulary"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    entropy_gradient: bool = False,
    token_block: int | None = None,
    vocab_block: int | None = None,
) -> TokenStatistics:
    r"""Log-prob of each target token and entropy of its distribution, without the logits' array.

    .. math:: \log p_{t} = z_{t} - \log \sum_v e^{z_v}, \quad H = -\sum_v p_v \log p_v, \quad
              z = c \tanh(s (h W + b) / c)

    The log-sum-exp runs over blocks of the vocabulary; the backward pass forms each block's logits
    once more. Products are accumulated in float32 whatever the dtype of `hidden`.

    Args:
      hidden: hidden states after the final norm; their dtype is that of the matrix products.
      kernel: the unembedding; any vocabulary size.
      targets: token ids in [0, vocabulary).
      bias: b, added to the logits, or None.
      softcap: c, or None for none.
      scale: s, or None for 1.
      entropy_gradient: whether gradients flow through the entropy; else it is a constant.
      token_block: most tokens of one block; None chooses.
      vocab_block: most columns of one block; None chooses.

    Returns:
      Float32 log-probs and entropies, [tokens]; uniform logits give -log(vocabulary).

    Raises:
      ValueError: if a block size is not positive.
    """
    plan = _plan(hidden.shape[0], kernel.shape[1], token_block, vocab_block, softcap, scale)
    log_prob, entropy = _statistics(plan, entropy_gradient, hidden, kernel, bias, targets)
    if not entropy_gradient:
        entropy = jax.lax.stop_gradient(entropy)
    return TokenStatistics(log_prob=log_prob, entropy=entropy)


def response_log_probs(
    params: Mapping[str, Any],
    config: Any,
    tokens: Int[Array, "batch length"],
    prompt_length: Int[Array, " batch"],
    response_tokens: Int[Array, "batch response"],
    response_length: Int[Array, " batch"],
    *,
    remat: str = "none",
    dtype: Any = None,
    entropy_gradient: bool = False,
    token_block: int | None = None,
    vocab_block: int | None = None,
    **adapters: Any,
) -> ResponseLogProbs:
    """Log-probs of the responses' tokens: the unembedding is applied at response positions alone.

    Args:
      params: nested dict of arrays.
      config: `DecoderConfig` or `EncoderDecoderConfig`.
      tokens: prompt and response behind one another, padded on the right.
      prompt_length: how many of `tokens` are prompt, at least 1 for a decoder.
      response_tokens: the responses, end-of-sequence included, padded on the right.
      response_length: how many of `response_tokens` are real.
      remat: what the backward pass computes again, as in `decoder.hidden_states`.
      dtype: of the computation; None is the parameters' own.
      entropy_gradient: as in `token_log_probs`.
      token_block: as in `token_log_probs`.
      vocab_block: as in `token_log_probs`.
      **adapters: `adapters` and `adapter_scale`, as in `decoder.hidden_states`.

    Returns:
      Float32 log-probs and entropies, [batch, response], 0 at padding.
    """
    hidden, kernel, bias, form = _response_states(
        params,
        config,
        tokens,
        prompt_length,
        response_tokens,
        response_length,
        remat=remat,
        dtype=dtype,
        **adapters,
    )
    out = token_log_probs(
        hidden.reshape(-1, hidden.shape[-1]),
        kernel,
        response_tokens.reshape(-1),
        bias=bias,
        **form,
        entropy_gradient=entropy_gradient,
        token_block=token_block,
        vocab_block=vocab_block,
    )
    real = jnp.arange(response_tokens.shape[1])[None] < response_length[:, None]

    def masked(x: Array) -> Array:
        return jnp.where(real, x.reshape(real.shape), 0.0)

    return ResponseLogProbs(log_prob=masked(out.log_prob), entropy=masked(out.entropy))


def _response_states(
    params, config, tokens, prompt_length, response_tokens, response_length, **options
):
    """Hidden states that predict the response [batch, response, width]; how logits follow."""
    from jaxalign.models.config import DecoderConfig

    if isinstance(config, DecoderConfig):
        from jaxalign.models.decoder import hidden_states, unembedding

        hidden = hidden_states(params, config, tokens, **options)
        places = prompt_length[:, None] - 1 + jnp.arange(response_tokens.shape[1])[None]
        places = jnp.clip(places, 0, tokens.shape[1] - 1)
        hidden = jnp.take_along_axis(hidden, places[:, :, None], axis=1)
    else:
        from jaxalign.models.encoder_decoder import response_states, unembedding

        hidden = response_states(params, config, tokens, prompt_length, response_tokens, **options)
    kernel, bias = unembedding(params, config)
    return hidden, kernel, bias, {"softcap": config.logit_softcap, "scale": config.logit_scale}


def text_log_probs(
    params: Mapping[str, Any],
    config: Any,
    tokens: Int[Array, "rows length"],
    segment_ids: Int[Array, "rows length"],
    positions: Int[Array, "rows length"],
    target_mask: Array,
    *,
    remat: str = "none",
    dtype: Any = None,
    token_block: int | None = None,
    vocab_block: int | None = None,
    **adapters: Any,
) -> Float[Array, "rows length"]:
    """Log-prob of each scored token of packed text, from the position before it.

    Args:
      params: nested dict of arrays.
      config: `DecoderConfig`.
      tokens: packed documents.
      segment_ids: 0 at padding; documents 1, 2, ...
      positions: restart at every document.
      target_mask: nonzero where a token is scored; the first of a document never is.
      remat: as in `decoder.hidden_states`.
      dtype: as in `decoder.hidden_states`.
      token_block: as in `token_log_probs`.
      vocab_block: as in `token_log_probs`.
      **adapters: `adapters` and `adapter_scale`, as in `decoder.hidden_states`.

    Returns:
      Float32, [rows, length], 0 where a token is not scored.
    """
    from jaxalign.models.decoder import hidden_states, unembedding

    hidden = hidden_states(
        params,
        config,
        tokens,
        segment_ids=segment_ids,
        positions=positions,
        remat=remat,
        dtype=dtype,
        **adapters,
    )
    kernel, bias = unembedding(params, config)
    # All positions rather than all but one: sizes stay round, and the last target is masked.
    targets = jnp.roll(tokens, -1, axis=1)
    out = token_log_probs(
        hidden.reshape(-1, hidden.shape[-1]),
        kernel,
        targets.reshape(-1),
        bias=bias,
        softcap=config.logit_softcap,
        scale=config.logit_scale,
        token_block=token_block,
        vocab_block=vocab_block,
    )
    log_prob = jnp.roll(out.log_prob.reshape(tokens.shape), 1, axis=1)
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    scored = (target_mask != 0) & (segment_ids != 0) & (segment_ids == before)
    return jnp.where(scored, log_prob, 0.0)
