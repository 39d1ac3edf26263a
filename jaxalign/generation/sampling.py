"""From logits to a token: temperature and truncation, and the draw itself; pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.errors import UserError

NEVER = -1e30  # the log-prob of a token that is cut off: finite, so that 0 * NEVER is 0


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; hashable, a program is compiled for each."""

    max_tokens: int = 64
    """Longest response, in tokens; an end or a stop may come before."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token (greedy)."""
    top_k: int = 0
    """Only the so many likeliest tokens (and those as likely as the last of them); 0: all."""
    top_p: float = 1.0
    """Only the fewest likeliest tokens whose probability adds up to this; 1: all."""
    min_p: float = 0.0
    """Only tokens at least this times as likely as the likeliest; 0: all."""
    repetition_penalty: float = 1.0
    """Logits of tokens that a row holds already are divided by it, negative ones multiplied; 1: not
    at all."""
    end_tokens: tuple[int, ...] = ()
    """Tokens that end a response; they belong to it."""

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
    r"""Logits that tokens are drawn with: temperature, then top-k, then top-p, then min-p.

    .. math:: \pi(y) \propto p(y)^{1/T} \, [y \text{ is kept by every rule in turn}]

    Args:
      logits: [rows, vocabulary], of any shift.
      sampling: the rules; at temperature 0 all mass is on the likeliest token.

    Returns:
      [rows, vocabulary], of any shift; -1e30 at tokens that are cut off. Nucleus (top-p): Holtzman
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
    r"""Logits in which tokens that are there already are less likely.

    .. math:: z'_y = z_y / \theta \text{ if } z_y > 0, \text{ else } z_y \theta, \quad
              y \text{ in the row}

    It depends on the logits' shift: the networks' own are meant, as transformers has it.

    Args:
      logits: [rows, vocabulary], as the network gives them.
      present: which tokens each row holds.
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
      logits: of each policy, of any shift: the constant takes it up.
      weights: of each policy; 1 - beta and beta for policy and reference. One policy alone is
        itself, whatever its weight.

    References:
      Munos et al., 2023, arXiv:2312.00886, section 7; Calandriello et al., 2024,
      arXiv:2403.08635, section 5.
    """
    if len(logits) == 1:
        return logits[0]
    return sum((weight * one for weight, one in zip(weights, logits, strict=True)), jnp.zeros(()))


def likeliest(logits: Float[Array, "rows vocabulary"], *, block: int = 128) -> Int[Array, " rows"]:
    """The first of the likeliest tokens: the best block of tokens, then the best in it.

    As `argmax`, which a CPU does one number at a time; the maxima of blocks cost one quick pass.

    Args:
      logits: of any shift.
      block: tokens compared together.
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
    """Tokens by inversion of the distribution function: a block of tokens, then one in it.

    Two uniform numbers a row instead of one Gumbel number for each token: the draw costs one pass
    over the vocabulary.

    Args:
      logits: of any shift.
      uniform: in [0, 1), independent.
      block: tokens drawn from together.

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
    """The first index whose cumulated weight passes the uniform number's share of the whole."""
    cumulated = jnp.cumsum(weights, axis=-1)
    passed = cumulated > uniform * cumulated[:, -1:]
    return jnp.argmax(passed, axis=-1, keepdims=True).astype(jnp.int32)
