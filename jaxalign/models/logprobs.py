"""Token log-probs, entropies and divergences from hidden states, without an array of logits.

Everything runs over blocks of tokens and of the vocabulary, forward and backward, in float32.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign.models import devices
from jaxalign.models.differentiation import with_reverse_rule
from jaxalign.models.precision import precision
from jaxalign.models.probes import (
    Spans,
    by_groups,
    cut,
    factored_gram,
    forms_gradients,
    gram,
    in_rows,
    lengths_of,
    number_of_sides,
    row_gradients,
    token_products,
)
from jaxalign.models.products import in_float32, input_gradient, kernel_gradient
from jaxalign.records import AnyArray, record

# Tokens and logits of a block. On a CPU: about the size of a core's cache. On accelerators, per
# device: narrow blocks of many tokens, since a block's gradients are summed over devices. By the
# TPU compiler's cost model (`benchmarks.head`) 2**26 logits take 3 to 19 % less time than 2**25.
BLOCKS = {"cpu": (512, 2**20), "gpu": (2**15, 2**25), "tpu": (2**15, 2**26)}
NEVER = -1e30  # logit of an ignored column: finite, so that 0 * NEVER is 0


@record
class TokenStatistics:
    """Log-prob and entropy of each token, in nats.

    Attributes:
      log_prob: log-prob of the target token.
      entropy: of the distribution over the vocabulary.
      collision: log-probability that two draws from it agree; None: not computed.
    """

    log_prob: Float[Array, " tokens"]
    entropy: Float[Array, " tokens"]
    collision: Float[Array, " tokens"] | None


@record
class UnembeddingProbe:
    """Zeros whose cotangents describe the unembedding's gradients, pair by pair (see `probes`).

    Attributes:
      gram: its cotangent is the Gram matrix of kernel and bias together.
      rows: where the kernel is tied to the embedding: its cotangent is, for each sequence of a
        group, the gradient's rows at the tokens that the group looks up. None: not tied.
      tokens: these tokens, one sequence's after the other's. None: not tied.
      spans: the sides among the tokens that are scored; None: they have equally many, in turn.
    """

    gram: Float[AnyArray, "groups products"]
    rows: Float[AnyArray, "groups sides tokens width"] | None = None
    tokens: Int[AnyArray, "groups tokens"] | None = None
    spans: Spans | None = None


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
        """First column of each vocabulary block that no earlier block covers."""
        return jnp.arange(self.vocab_blocks, dtype=jnp.int32) * self.vocab_block

    def start(self, first: Array) -> Array:
        """First column that a block reads: the last block ends with the vocabulary."""
        return jnp.minimum(first, self.vocabulary - self.vocab_block)

    def columns(self, first: Array) -> Array:
        """The indices of a block's columns; -1 where an earlier block covers one."""
        column = self.start(first) + jnp.arange(self.vocab_block)
        return jnp.where(column >= first, column, -1)

    def split(self, x: Array) -> Array:
        """[tokens, ...] -> [token_blocks, size, ...], each block a strided sample of the tokens.

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
    usual, block_logits = BLOCKS.get(devices.platform(), BLOCKS["gpu"])
    if devices.platform() != "cpu":
        usual, block_logits = (size * devices.device_count() for size in (usual, block_logits))
    token_blocks = max(1, -(-tokens // (token_block or usual)))
    # A divisor of the tokens needs no padding; take the next one if it is not far.
    near = (n for n in range(token_blocks, 2 * token_blocks) if tokens % n == 0)
    token_blocks = next(near, token_blocks)
    if vocab_block is None:
        vocab_block = max(1024, block_logits // max(1, tokens // token_blocks))
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


def _columns(
    plan: _Plan, kernel: Array, bias: Array | None, first: Array, dtype: Any
) -> tuple[Array, Array | None]:
    """One block of the unembedding, in the dtype of the computation."""
    start = plan.start(first)
    block = jax.lax.dynamic_slice_in_dim(kernel, start, plan.vocab_block, axis=1).astype(dtype)
    if bias is not None:
        bias = jax.lax.dynamic_slice_in_dim(bias, start, plan.vocab_block).astype(jnp.float32)
    return block, bias


def _logits(plan: _Plan, hidden: Array, kernel: Array, bias: Array | None, first: Array) -> Array:
    """Float32 logits of a block of tokens and columns; columns of earlier blocks are ignored."""
    z = _products(plan, hidden, kernel, bias)
    if plan.vocab_blocks * plan.vocab_block > plan.vocabulary:
        z = jnp.where((plan.columns(first) >= 0)[None], z, NEVER)
    return z


def _products(plan: _Plan, hidden: Array, kernel: Array, bias: Array | None) -> Array:
    """Float32 logits of some tokens and some columns."""
    z = in_float32(hidden, kernel)
    if bias is not None:
        z = z + bias[None]
    if plan.scale is not None:
        z = z * plan.scale
    if plan.softcap is not None:
        z = plan.softcap * jnp.tanh(z / plan.softcap)
    return z


def _at_targets(plan: _Plan, z: Array, targets: Array, first: Array) -> Array:
    """The logit of each target that lies in this block; 0 for the others."""
    start = plan.start(first)
    inside = (targets >= first) & (targets < start + plan.vocab_block)
    place = jnp.clip(targets - start, 0, plan.vocab_block - 1)
    return jnp.where(inside, jnp.take_along_axis(z, place[:, None], axis=1)[:, 0], 0.0)


def _gradients(plan: _Plan, slope_at: Any, hidden, kernel, bias, rows):
    """Cotangents of hidden states, kernel and bias from that of the logits, block by block.

    Args:
      plan: blocks and the form of the logits.
      slope_at: first column of a block -> (z [size, vocab_block], rows) -> cotangent of z.
      hidden: [tokens, width].
      kernel: [width, vocabulary].
      bias: [vocabulary] or None.
      rows: pytree of [tokens, ...] arrays that the slope reads.
    """
    hiddens, rows = plan.split(hidden), jax.tree.map(plan.split, rows)

    def vocabulary_step(carry, first):
        d_hiddens, d_kernel, d_bias = carry
        block, bias_block = _columns(plan, kernel, bias, first, hidden.dtype)
        slope = slope_at(first)

        def token_step(sums, inputs):
            x, d_x, row = inputs
            z = _logits(plan, x, block, bias_block, first)
            d_z = _through_form(plan, z, slope(z, row))
            d_z, d_bias_block = d_z.astype(x.dtype), jnp.sum(d_z, axis=0)
            d_x = d_x + input_gradient(d_z, block)
            d_block = kernel_gradient(x, d_z)
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

    carry: Any = (
        jnp.zeros(hiddens.shape, jnp.float32),
        jnp.zeros(kernel.shape, jnp.float32),
        None if bias is None else jnp.zeros(bias.shape, jnp.float32),
    )
    (d_hiddens, d_kernel, d_bias), _ = jax.lax.scan(vocabulary_step, carry, plan.first_columns())
    d_hidden = plan.join(d_hiddens).astype(hidden.dtype)
    if bias is not None:
        d_bias = d_bias.astype(bias.dtype)
    return d_hidden, d_kernel.astype(kernel.dtype), d_bias


def _watched_gradients(plan: _Plan, slope_of: Any, hidden, kernel, bias, rows, probe):
    """`_gradients` of tokens that belong to groups, and the cotangents of their probe.

    Each row's own gradient of a block of columns is computed, used and summed; or, where that
    costs more, the tokens' inner products are summed over the blocks. `slope_of` takes the indices
    of columns instead of a block's first one.
    """
    sides, width, at = number_of_sides(probe.gram), hidden.shape[-1], precision(hidden.dtype)
    spans, lengths = probe.spans, lengths_of(probe.spans)
    hiddens = by_groups(hidden, probe.gram, spans)
    rows = jax.tree.map(lambda x: by_groups(x[:, None], probe.gram, spans)[..., 0], rows)
    if spans is not None:
        rows["real"] = spans.real
    groups, _, response, _ = hiddens.shape
    forms = forms_gradients(len(hidden) // (groups * sides), width, plan.vocabulary, sides)
    product = functools.partial(jnp.einsum, precision=at, preferred_element_type=jnp.float32)

    def output_cotangents(z, row, slope):
        """[sides tokens, columns] -> [sides, tokens, columns] in float32."""
        flat = jax.tree.map(jnp.ravel, row)
        d_z = _through_form(plan, z, slope(z, flat))
        d_z = d_z if spans is None else jnp.where(flat["real"][:, None], d_z, 0.0)
        return d_z.reshape(sides, -1, z.shape[-1])

    def vocabulary_step(carry, first):
        d_kernel, d_bias, sums = carry
        block, bias_block = _columns(plan, kernel, bias, first, hidden.dtype)
        slope, start = slope_of(plan.columns(first)), plan.start(first)

        def of_tokens(x, row, size):
            """What a group adds, from so many tokens of all its sides."""
            x, row = x[:, :size], jax.tree.map(lambda x: x[:, :size], row)
            z = _logits(plan, x.reshape(-1, width), block, bias_block, first)
            d_z = output_cotangents(z, row, slope)
            d_bias_rows, d_z = d_z.sum(1), d_z.astype(x.dtype)
            flat, missing = d_z.reshape(-1, d_z.shape[-1]), (0, response - size)
            d_x = input_gradient(flat, block).reshape(x.shape)
            more: dict[str, Any] = {
                "d_x": jnp.pad(d_x, ((0, 0), missing, (0, 0))),
                "gram": jnp.zeros(probe.gram.shape[1:], jnp.float32),
            }
            if forms:
                own = row_gradients(d_z, x)
                more["gram"] = gram(*own)
                d_block = sum(own[1:], own[0])
            else:
                more["products"] = jnp.pad(token_products(d_z), ((0, 0), missing, missing))
                d_block = kernel_gradient(flat, x.reshape(-1, width))
            if bias is not None:
                more["gram"] = more["gram"] + gram(*d_bias_rows[:, None])
            return (d_block, d_bias_rows.sum(0)), more

        inputs = hiddens, rows, sums, lengths
        if devices.is_single_cpu():

            def step(total, inputs):
                x, row, sums, length = inputs
                added, more = cut(functools.partial(of_tokens, x, row), response, length)
                add = functools.partial(jax.tree.map, jnp.add)
                return add(total, added), add(sums, more)

            zeros = jnp.zeros(block.T.shape), jnp.zeros(block.shape[1])
            (d_block, d_bias_block), sums = jax.lax.scan(step, zeros, inputs)
        else:
            added, more = jax.vmap(lambda x, row: of_tokens(x, row, response))(hiddens, rows)
            sums = jax.tree.map(jnp.add, sums, more)
            d_block, d_bias_block = (x.sum(0) for x in added)
        d_kernel = _add_at(d_kernel, d_block, start, axis=0)
        if bias is not None:
            d_bias = _add_at(d_bias, d_bias_block, start, axis=0)
        return (d_kernel, d_bias, sums), None

    sums: dict[str, Any] = {
        "d_x": jnp.zeros(hiddens.shape, jnp.float32),
        "gram": jnp.zeros(probe.gram.shape, jnp.float32),
    }
    if not forms:
        sums["products"] = jnp.zeros((*probe.gram.shape, response, response))
    carry: Any = (
        jnp.zeros(kernel.T.shape, jnp.float32),
        None if bias is None else jnp.zeros(bias.shape, jnp.float32),
        sums,
    )
    (d_kernel, d_bias, sums), _ = jax.lax.scan(vocabulary_step, carry, plan.first_columns())
    geometry, d_hidden = sums["gram"], sums["d_x"]
    if not forms:
        geometry = geometry + factored_gram(token_products(hiddens), sums["products"])
    if spans is not None:
        d_hidden = in_rows(d_hidden, spans, len(hidden) // spans.rows)
    d_hidden = d_hidden.reshape(hidden.shape).astype(hidden.dtype)
    if bias is not None:
        d_bias = d_bias.astype(bias.dtype)
    d_probe = dataclasses.replace(probe, gram=geometry, tokens=None, spans=None)
    if probe.tokens is not None:

        def at_tokens(inputs):
            x, row, tokens, length = inputs
            columns = jnp.take(kernel, tokens, axis=1).astype(x.dtype)
            biases = None if bias is None else jnp.take(bias, tokens).astype(jnp.float32)

            def of_responses(size):
                own, some = x[:, :size], jax.tree.map(lambda x: x[:, :size], row)
                z = _products(plan, own.reshape(-1, width), columns, biases)
                d_z = output_cotangents(z, some, slope_of(tokens)).astype(x.dtype)
                return product("nrt,nri->nti", d_z, own)

            return cut(of_responses, response, length if devices.is_single_cpu() else None)

        inputs = hiddens, rows, probe.tokens, lengths
        of_all = jax.lax.map if devices.is_single_cpu() else lambda f, xs: jax.vmap(f)(xs)
        d_probe = dataclasses.replace(d_probe, rows=of_all(at_tokens, inputs))
    return d_hidden, d_kernel.T.astype(kernel.dtype), d_bias, d_probe


def _through_form(plan: _Plan, z: Array, d_z: Array) -> Array:
    """The cotangent of the product with the kernel from that of the logits z."""
    if plan.softcap is not None:
        # Ignored columns lie far outside the cap: their slope is 0 and not infinite.
        d_z = d_z * (1.0 - jnp.square(jnp.clip(z / plan.softcap, -1.0, 1.0)))
    return d_z if plan.scale is None else d_z * plan.scale


def _add_at(whole: Array, part: Array, start: Array, *, axis: int) -> Array:
    old = jax.lax.dynamic_slice_in_dim(whole, start, part.shape[axis], axis=axis)
    return jax.lax.dynamic_update_slice_in_dim(whole, old + part, start, axis=axis)


def _accumulate(state, z: Array, value: Array | None = None):
    """Running maximum, sum of exponentials, and the same sum weighted by value.

    Without a value it is z - maximum.
    """
    top, total, weighted = state
    # The maximum only scales; the sums do not depend on it, so it counts as a constant.
    new = jax.lax.stop_gradient(jnp.maximum(top, jnp.max(z, axis=1)))
    shrink, weights = jnp.exp(top - new), jnp.exp(z - new[:, None])
    if value is None:
        value, weighted = z - new[:, None], weighted + (top - new) * total
    weighted = shrink * weighted + jnp.sum(weights * value, axis=1)
    return new, shrink * total + jnp.sum(weights, axis=1), weighted


def _nothing_yet(blocks: Array):
    """The state of `_accumulate` before the first block, for tokens in [blocks, size, ...]."""
    shape = blocks.shape[:2]
    return jnp.full(shape, NEVER), jnp.zeros(shape), jnp.zeros(shape)


def _statistics_forward(plan, collision, hidden, kernel, bias, targets):
    hiddens, target_blocks = plan.split(hidden), plan.split(targets)

    def vocabulary_step(state, first):
        block, bias_block = _columns(plan, kernel, bias, first, hidden.dtype)

        def token_step(_, inputs):
            x, target, sums, found, squares = inputs
            z = _logits(plan, x, block, bias_block, first)
            squares = _accumulate(squares, 2 * z) if collision else None
            found = found + _at_targets(plan, z, target, first)
            return None, (_accumulate(sums, z), found, squares)

        _, state = jax.lax.scan(token_step, None, (hiddens, target_blocks, *state))
        return state, None

    squares = _nothing_yet(hiddens) if collision else None
    state = _nothing_yet(hiddens), jnp.zeros(target_blocks.shape), squares
    (sums, found, squares), _ = jax.lax.scan(vocabulary_step, state, plan.first_columns())
    top, total, weighted = (plan.join(x) for x in sums)
    log_total = jnp.log(total)
    log_sum = top + log_total
    agree = None
    if squares is not None:
        agree = plan.join(squares[0]) + jnp.log(plan.join(squares[1])) - 2 * log_sum
    return (plan.join(found) - log_sum, log_total - weighted / total, agree), log_sum


def _statistics_fwd(plan, entropy_gradient, collision, hidden, kernel, bias, targets, probe):
    out, log_sum = _statistics_forward(plan, collision, hidden, kernel, bias, targets)
    return out, (hidden, kernel, bias, targets, log_sum, out[1], probe)


def _statistics_bwd(plan, entropy_gradient, collision, saved, cotangents):
    del collision
    hidden, kernel, bias, targets, log_sum, entropy, probe = saved
    rows = {"target": targets, "log_sum": log_sum, "by_log_prob": cotangents[0]}
    if entropy_gradient:
        rows |= {"entropy": entropy, "by_entropy": cotangents[1]}

    def slope_of(columns):
        def slope(z, row):
            log_p = z - row["log_sum"][:, None]
            p = jnp.exp(log_p)
            hit = columns[None] == row["target"][:, None]  # no target is -1
            d_z = jnp.where(hit, 1.0 - p, -p) * row["by_log_prob"][:, None]
            if entropy_gradient:
                d_z = d_z - p * (log_p + row["entropy"][:, None]) * row["by_entropy"][:, None]
            return d_z

        return slope

    if probe is None:

        def slope_at(first):
            return slope_of(plan.columns(first))

        return *_gradients(plan, slope_at, hidden, kernel, bias, rows), None, None
    *of_inputs, d_probe = _watched_gradients(plan, slope_of, hidden, kernel, bias, rows, probe)
    return *of_inputs, None, d_probe


def _statistics_primal(plan, entropy_gradient, collision, hidden, kernel, bias, targets, probe):
    return _statistics_forward(plan, collision, hidden, kernel, bias, targets)[0]


_statistics = with_reverse_rule(_statistics_primal, _statistics_fwd, _statistics_bwd, (0, 1, 2))


def token_log_probs(
    hidden: Float[Array, "tokens width"],
    kernel: Float[Array, "width vocabulary"],
    targets: Int[Array, " tokens"],
    *,
    bias: Float[Array, " vocabulary"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    entropy_gradient: bool = False,
    collision: bool = False,
    token_block: int | None = None,
    vocab_block: int | None = None,
    probe: UnembeddingProbe | None = None,
) -> TokenStatistics:
    r"""Log-prob of each target token and entropy of its distribution, without the logits' array.

    .. math:: \log p_{t} = z_{t} - \log \sum_v e^{z_v}, \quad H = -\sum_v p_v \log p_v, \quad
              C = \log \sum_v p_v^2, \quad z = c \tanh(s (h W + b) / c)

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
      collision: whether to compute C, through which no gradient flows.
      token_block: maximum number of tokens in a block; None chooses.
      vocab_block: maximum number of columns in a block; None chooses.
      probe: watches the unembedding's gradients; without spans, tokens are then those of rows of
        the same length, the sides of one group after those of another.

    Returns:
      Float32 log-probs, entropies and C or None, [tokens]; uniform logits give -log(vocabulary),
      its negative and the same again.

    Raises:
      ValueError: if a block size is not positive.
    """
    plan = _plan(hidden.shape[0], kernel.shape[1], token_block, vocab_block, softcap, scale)
    log_prob, entropy, agree = _statistics(
        plan, entropy_gradient, collision, hidden, kernel, bias, targets, probe
    )
    if not entropy_gradient:
        entropy = jax.lax.stop_gradient(entropy)
    agree = None if agree is None else jax.lax.stop_gradient(agree)
    return TokenStatistics(log_prob=log_prob, entropy=entropy, collision=agree)


def _divergence_fwd(plan, reverse, policy, reference):
    """Each side is (hidden, kernel, bias)."""
    sides = (policy, reference)
    hiddens = tuple(plan.split(hidden) for hidden, _, _ in sides)

    def vocabulary_step(states, first):
        blocks = [_columns(plan, kernel, bias, first, x.dtype) for x, kernel, bias in sides]
        (kernel_p, bias_p), (kernel_r, bias_r) = blocks

        def token_step(_, inputs):
            xs, (of_policy, of_reference) = inputs
            z_p = _logits(plan, xs[0], kernel_p, bias_p, first)
            z_r = _logits(plan, xs[1], kernel_r, bias_r, first)
            gap = z_p - z_r
            return None, (_accumulate(of_policy, z_p, gap), _accumulate(of_reference, z_r, -gap))

        return jax.lax.scan(token_step, None, (hiddens, states))[1], None

    states = tuple(_nothing_yet(x) for x in hiddens)
    states, _ = jax.lax.scan(vocabulary_step, states, plan.first_columns())
    states = jax.tree.map(plan.join, states)
    log_sums = tuple(top + jnp.log(total) for top, total, _ in states)
    means = tuple(weighted / total for _, total, weighted in states)
    gap = log_sums[0] - log_sums[1]
    divergence = means[1] + gap if reverse else means[0] - gap
    return divergence, (policy, reference, log_sums, divergence)


def _divergence_bwd(plan, reverse, saved, cotangent):
    policy, reference, log_sums, divergence = saved
    rows = {
        "other": reference[0],
        "log_sum": log_sums[0],
        "other_log_sum": log_sums[1],
        "divergence": divergence,
        "by": cotangent,
    }

    def slope_at(first):
        kernel, bias = _columns(plan, reference[1], reference[2], first, reference[0].dtype)

        def slope(z, row):
            log_p = z - row["log_sum"][:, None]
            log_r = _logits(plan, row["other"], kernel, bias, first)
            log_r = log_r - row["other_log_sum"][:, None]
            if reverse:
                return (jnp.exp(log_p) - jnp.exp(log_r)) * row["by"][:, None]
            return (
                jnp.exp(log_p) * (log_p - log_r - row["divergence"][:, None]) * row["by"][:, None]
            )

        return slope

    hidden, kernel, bias = policy
    to_policy = _gradients(plan, slope_at, hidden, kernel, bias, rows)
    return to_policy, jax.tree.map(jnp.zeros_like, reference)


def _divergence_primal(plan, reverse, policy, reference):
    return _divergence_fwd(plan, reverse, policy, reference)[0]


_divergence: Any = jax.custom_vjp(_divergence_primal, nondiff_argnums=(0, 1))
_divergence.defvjp(_divergence_fwd, _divergence_bwd)


def token_kl(
    hidden: Float[Array, "tokens width"],
    kernel: Float[Array, "width vocabulary"],
    reference_hidden: Float[Array, "tokens reference_width"],
    reference_kernel: Float[Array, "reference_width vocabulary"],
    *,
    bias: Float[Array, " vocabulary"] | None = None,
    reference_bias: Float[Array, " vocabulary"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    reverse: bool = False,
    token_block: int | None = None,
    vocab_block: int | None = None,
) -> Float[Array, " tokens"]:
    r"""Exact divergence between the policy's and the reference's next-token distributions.

    .. math:: KL(\pi \| \pi_{ref}) = \sum_v \pi_v (\log \pi_v - \log \pi_{ref, v})

    Gradients flow to the policy alone. Blocks are those of `token_log_probs`: no array of logits.

    Args:
      hidden: the policy's hidden states.
      kernel: the policy's unembedding.
      reference_hidden: the reference's hidden states at the same positions.
      reference_kernel: the reference's unembedding.
      bias: the policy's, or None.
      reference_bias: the reference's, or None.
      softcap: of both, as in `token_log_probs`.
      scale: of both, as in `token_log_probs`.
      reverse: KL(reference || policy) instead, the form in TDPO (arXiv:2404.11999).
      token_block: as in `token_log_probs`.
      vocab_block: as in `token_log_probs`.

    Returns:
      Float32, [tokens], in nats; 0 where the distributions are equal.
    """
    plan = _plan(hidden.shape[0], kernel.shape[1], token_block, vocab_block, softcap, scale)
    reference = (reference_hidden, reference_kernel, reference_bias)
    return _divergence(plan, reverse, (hidden, kernel, bias), jax.lax.stop_gradient(reference))
