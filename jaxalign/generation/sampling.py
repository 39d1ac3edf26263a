"""Sampling of tokens from logits: temperature, truncation and draws, as pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.errors import UserError

NEVER = -1e30  # the logit of an excluded token: finite, so that 0 * NEVER is 0


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings; hashable, since each compiles a program."""

    max_tokens: int = 64
    """Longest response in tokens; it may end earlier."""
    temperature: float = 1.0
    """Divisor of the logits; 0: always the most likely token (greedy)."""
    top_k: int = 0
    """Keep the k most likely tokens (and those as likely as the last of them); 0: all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens with this total probability; 1: all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one; 0: all."""
    repetition_penalty: float = 1.0
    """Logits of tokens that are already in the row are divided by it if positive, else multiplied;
    1: no penalty."""
    end_tokens: tuple[int, ...] = ()
    """Tokens that end a response; they are part of it."""

    @property
    def truncates(self) -> bool:
        """Whether some tokens of the tempered distribution are never sampled."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def __post_init__(self):
        if self.max_tokens < 1:
            raise UserError(f"max_tokens: {self.max_tokens} is not positive")
        if not self.temperature >= 0:
            raise UserError(f"temperature: {self.temperature} is negative; 0 is greedy")
        if self.top_k < 0:
            raise UserError(f"top_k: {self.top_k} is negative; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is not in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p: {self.min_p} is not in [0, 1]")
        if not self.repetition_penalty > 0:
            raise UserError(
                f"repetition_penalty: {self.repetition_penalty} is not positive; 1 is none"
            )


def distribution(
    logits: Float[Array, "rows vocabulary"], sampling: Sampling
) -> Float[Array, "rows vocabulary"]:
    r"""Logits of the sampled distribution: temperature, then top-k, then top-p, then min-p.

    .. math:: \pi(y) \propto p(y)^{1/T} \, [y \text{ is kept by every rule in turn}]

    Args:
      logits: [rows, vocabulary], up to a constant.
      sampling: settings; at temperature 0 all mass is on the most likely token.

    Returns:
      [rows, vocabulary], up to a constant; -1e30 at excluded tokens. Nucleus (top-p): Holtzman
      et al., 2020, arXiv:1904.09751; min-p: Nguyen et al., 2024, arXiv:2407.01082.
    """
    vocabulary = logits.shape[-1]
    if sampling.temperature == 0:
        best = jnp.argmax(logits, -1, keepdims=True)
        return jnp.where(jnp.arange(vocabulary)[None] == best, 0.0, NEVER)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature

    def keep_from(least: Array) -> Array:
        return jnp.where(logits >= least, logits, NEVER)

    if 0 < sampling.top_k < vocabulary:
        logits = keep_from(jax.lax.top_k(logits, sampling.top_k)[0][:, -1:])
    if sampling.top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        probs = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        last = jnp.maximum(jnp.sum(before < sampling.top_p, -1, keepdims=True) - 1, 0)
        logits = keep_from(jnp.take_along_axis(ordered, last, axis=-1))
    if sampling.min_p > 0:
        logits = keep_from(jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p))
    return logits


def penalised(
    logits: Float[Array, "rows vocabulary"], present: Bool[Array, "rows vocabulary"], penalty: float
) -> Float[Array, "rows vocabulary"]:
    r"""Logits with a penalty on tokens that are already present.

    .. math:: z'_y = z_y / \theta \text{ if } z_y > 0, \text{ else } z_y \theta, \quad
              y \text{ in the row}

    This depends on the logits' constant: they must be the network's own, as in transformers.

    Args:
      logits: [rows, vocabulary], of the network.
      present: the tokens in each row.
      penalty: theta > 0; above 1 it discourages.

    References:
      Keskar et al., 2019, arXiv:1909.05858, section 4.1.
    """
    less = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(present, less, logits)


def mixture(
    logits: Sequence[Float[Array, "rows vocabulary"]], weights: Float[Array, " policies"]
) -> Float[Array, "rows vocabulary"]:
    r"""Logits of the geometric mixture of next-token distributions.

    .. math:: \log\pi_{mix}(y) = \sum_i w_i \log\pi_i(y) + C

    Args:
      logits: of each policy, up to a constant.
      weights: of each policy; 1 - beta and beta for policy and reference. A single policy is
        returned unchanged, whatever its weight.

    References:
      Munos et al., 2023, arXiv:2312.00886, section 7; Calandriello et al., 2024,
      arXiv:2403.08635, section 5.
    """
    if len(logits) == 1:
        return logits[0]
    return sum((weight * one for weight, one in zip(weights, logits, strict=True)), jnp.zeros(()))


def most_likely(
    logits: Float[Array, "rows vocabulary"], *, block: int = 128
) -> Int[Array, " rows"]:
    """The first of the most likely tokens: the best block of tokens, then the best in it.

    The same as `argmax`, but faster on a CPU.

    Args:
      logits: up to a constant.
      block: number of tokens in a block.
    """
    rows, vocabulary = logits.shape
    blocks = -(-vocabulary // block)
    padding = ((0, 0), (0, blocks * block - vocabulary))
    padded = jnp.pad(logits, padding, constant_values=-jnp.inf).reshape(rows, blocks, block)
    which = jnp.argmax(padded.max(-1), axis=-1, keepdims=True)
    inside = jnp.take_along_axis(padded, which[:, :, None], axis=1)[:, 0]
    return (which[:, 0] * block + jnp.argmax(inside, axis=-1)).astype(jnp.int32)


def draw(
    logits: Float[Array, "rows vocabulary"], uniform: Float[Array, "rows 2"], *, block: int = 128
) -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
    """Draw tokens by inversion of the distribution function: a block of tokens, then one in it.

    This needs two uniform numbers per row instead of one Gumbel number per token, and one pass over
    the vocabulary.

    Args:
      logits: up to a constant.
      uniform: independent, in [0, 1).
      block: number of tokens in a block.

    Returns:
      The tokens and their log-probs.
    """
    rows, vocabulary = logits.shape
    blocks = -(-vocabulary // block)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    weights = jnp.pad(weights, ((0, 0), (0, blocks * block - vocabulary)))
    weights = weights.reshape(rows, blocks, block)
    sums = weights.sum(-1)
    which = _invert(sums, uniform[:, :1])
    inside = jnp.take_along_axis(weights, which[:, :, None], axis=1)[:, 0]
    token = which * block + _invert(inside, uniform[:, 1:])
    drawn = jnp.take_along_axis(logits, token, axis=1) - top
    return token[:, 0], drawn[:, 0] - jnp.log(sums.sum(-1))


def _invert(
    weights: Float[Array, "rows n"], uniform: Float[Array, "rows 1"]
) -> Int[Array, "rows 1"]:
    """The first index whose cumulative weight exceeds the uniform number times the total."""
    cumulative = jnp.cumsum(weights, axis=-1)
    exceeds = cumulative > uniform * cumulative[:, -1:]
    return jnp.argmax(exceeds, axis=-1, keepdims=True).astype(jnp.int32)
