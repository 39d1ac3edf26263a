"""Losses of supervised fine-tuning."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.losses.pairs import PairLogProbs

Mask = Bool[Array, "rows tokens"] | Int[Array, "rows tokens"] | Float[Array, "rows tokens"]


def sft(pairs: PairLogProbs) -> Float[Array, " pairs"]:
    r"""Negative log-likelihood per token of the chosen response: the supervised part of mixtures.

    .. math:: \ell = -\frac{\log\pi_w}{L_w}

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].

    Returns:
      One loss per pair, [pairs], not reduced. Each pair counts alike, as in RPO and MPO; TRL's
      `sft` takes the mean over all chosen tokens of a batch, which is the same where the responses
      have the same length.

    Slopes:
      d_w / d_l = infinite: d_l = 0

    References:
      The supervised term of Pang et al., 2024, arXiv:2404.19733, equation 1, and of Wang et al.,
      2024, arXiv:2411.10442.
    """
    return -pairs.chosen_mean


def sft_token_mean(
    log_probs: Float[Array, "rows tokens"],
    mask: Mask,
    weight: Float[Array, " rows"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""Negative log-likelihood as a sum and the count to divide it by.

    .. math:: \ell = -\frac{\sum_{i,t} w_i m_{it} \log\pi(y_{it})}{\sum_{i,t} w_i m_{it}}

    Sum and count are returned separately, because the mean over a batch is not the mean of its
    micro-batches' means when they hold different numbers of tokens: add sums and counts, divide
    last.

    Args:
      log_probs: log-probability of each token, in nats, [rows, tokens].
      mask: 1 or true where the token is scored, [rows, tokens]; values elsewhere are not read.
      weight: weight of each row, [rows]; 0 for padding rows. Default None: 1.

    Returns:
      (sum, count), two scalars: minus the weighted sum of log-probabilities, and the weighted
      number of tokens. Uniform over V tokens, sum / count is log V.

    References:
      The maximum-likelihood loss of Radford et al., 2018, eq. 1, on target tokens alone.
    """
    scored = _scored(log_probs, mask)
    counted = mask.astype(log_probs.dtype)
    if weight is not None:
        scored, counted = scored * weight[:, None], counted * weight[:, None]
    return -jnp.sum(scored), jnp.sum(counted)


def sft_sequence_sum(log_probs: Float[Array, "rows tokens"], mask: Mask) -> Float[Array, " rows"]:
    r"""Negative log-likelihood of each whole sequence: long answers count by their length.

    .. math:: \ell_i = -\sum_t m_{it} \log\pi(y_{it})

    Args:
      log_probs: log-probability of each token, in nats, [rows, tokens].
      mask: 1 or true where the token is scored, [rows, tokens]; values elsewhere are not read.

    Returns:
      One loss per row, [rows], not reduced. Uniform over V tokens, length times log V.

    References:
      Rafailov et al., 2023, arXiv:2305.18290 (the reference implementation's SFT loss).
    """
    return -jnp.sum(_scored(log_probs, mask), axis=-1)


def _scored(log_probs: Float[Array, "rows tokens"], mask: Mask) -> Float[Array, "rows tokens"]:
    """Log-probs at scored tokens, 0 elsewhere; selected by `where`, as padding may be -inf."""
    return jnp.where(mask.astype(bool), log_probs, 0.0)
