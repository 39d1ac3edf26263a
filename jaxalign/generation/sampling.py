"""From logits to a token: temperature and truncation, and the draw itself; pure functions."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
    end_tokens: tuple[int, ...] = ()
    """Tokens that end a response; they belong to it."""

    def __post_init__(self):
        if self.max_tokens < 1:
            raise UserError(f"max_tokens: {self.max_tokens} is not positive")
        if self.temperature < 0:
            raise UserError(f"temperature: {self.temperature} is negative; 0 is greedy")
        if self.top_k < 0:
            raise UserError(f"top_k: {self.top_k} is negative; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is not in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p: {self.min_p} is not in [0, 1]")


def distribution(
    logits: Float[Array, "rows vocabulary"], sampling: Sampling
) -> Float[Array, "rows vocabulary"]:
    r"""Log-probs that tokens are drawn with: temperature, then top-k, then top-p, then min-p.

    .. math:: \pi(y) \propto p(y)^{1/T} \, [y \text{ is kept by every rule in turn}]

    Args:
      logits: [rows, vocabulary], of any shift.
      sampling: the rules; at temperature 0 all mass is on the likeliest token.

    Returns:
      [rows, vocabulary], normalised; -1e30 at tokens that are cut off. Nucleus (top-p): Holtzman et
      al., 2020, arXiv:1904.09751; min-p: Nguyen et al., 2024, arXiv:2407.01082.
    """
    vocabulary = logits.shape[-1]
    if sampling.temperature == 0:
        best = jnp.argmax(logits, -1, keepdims=True)
        return jnp.where(jnp.arange(vocabulary)[None] == best, 0.0, NEVER)
    log_probs = jax.nn.log_softmax(logits / sampling.temperature)

    def keep_from(log_probs: Array, least: Array) -> Array:
        kept = log_probs >= least
        total = jax.nn.logsumexp(jnp.where(kept, log_probs, -jnp.inf), axis=-1, keepdims=True)
        return jnp.where(kept, log_probs - total, NEVER)

    if 0 < sampling.top_k < vocabulary:
        log_probs = keep_from(log_probs, jax.lax.top_k(log_probs, sampling.top_k)[0][:, -1:])
    if sampling.top_p < 1:
        ordered = -jnp.sort(-log_probs, axis=-1)
        before = jnp.cumsum(jnp.exp(ordered), axis=-1) - jnp.exp(ordered)
        last = jnp.maximum(jnp.sum(before < sampling.top_p, -1, keepdims=True) - 1, 0)
        log_probs = keep_from(log_probs, jnp.take_along_axis(ordered, last, axis=-1))
    if sampling.min_p > 0:
        most = jnp.max(log_probs, axis=-1, keepdims=True)
        log_probs = keep_from(log_probs, most + jnp.log(sampling.min_p))
    return log_probs


def mixture(
    log_probs: Float[Array, "policies rows vocabulary"], weights: Float[Array, " policies"]
) -> Float[Array, "rows vocabulary"]:
    r"""Logits of the geometric mixture of next-token distributions.

    .. math:: \log\pi_{mix}(y) = \sum_i w_i \log\pi_i(y) + C

    Args:
      log_probs: of each policy (logits do as well: they differ by the constant).
      weights: of each policy; 1 - beta and beta for policy and reference.

    References:
      Munos et al., 2023, arXiv:2312.00886, section 7; Calandriello et al., 2024,
      arXiv:2403.08635, section 5.
    """
    return jnp.einsum("p,prv->rv", weights, log_probs, precision=jax.lax.Precision.HIGHEST)


def draw(
    log_probs: Float[Array, "rows vocabulary"], uniform: Float[Array, "rows 2"], *, block: int = 128
) -> Int[Array, " rows"]:
    """Tokens by inversion of the distribution function: a block of tokens, then one in it.

    Two uniform numbers a row instead of one Gumbel number for each token: the draw costs one pass
    over the vocabulary.

    Args:
      log_probs: normalised.
      uniform: in [0, 1), independent.
      block: tokens drawn from together.
    """
    rows, vocabulary = log_probs.shape
    blocks = -(-vocabulary // block)
    missing = blocks * block - vocabulary
    probs = jnp.exp(log_probs)
    probs = jnp.pad(probs, ((0, 0), (0, missing))).reshape(rows, blocks, block)
    which = _invert(probs.sum(-1), uniform[:, :1])
    inside = jnp.take_along_axis(probs, which[:, :, None], axis=1)[:, 0]
    return which[:, 0] * block + _invert(inside, uniform[:, 1:])[:, 0]


def _invert(
    weights: Float[Array, "rows n"], uniform: Float[Array, "rows 1"]
) -> Int[Array, "rows 1"]:
    """The first index whose cumulated weight passes the uniform number's share of the whole."""
    cumulated = jnp.cumsum(weights, axis=-1)
    passed = cumulated > uniform * cumulated[:, -1:]
    return jnp.argmax(passed, axis=-1, keepdims=True).astype(jnp.int32)
