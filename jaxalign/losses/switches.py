"""Options of a training step that act on the log-probs of pairs before any loss."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign.losses.divergence import REVERSE_KL, Divergence
from jaxalign.losses.pairs import PairLogProbs


@dataclass(frozen=True, kw_only=True)
class Switches:
    r"""What is done to the log-probs of pairs before any loss; the defaults do nothing.

    Attributes:
      divergence: score of the log-ratios that losses read.
      log_probs: log-probs of a response: their sum over its tokens, or their mean. Lengths are 1
        where they are means, so that a loss per token does not divide twice.
      tail_weight: LD-DPO's alpha: weight of the tokens after the length of the pair's shorter
        response, under policy and reference.
      importance: whether the loss of a pair is multiplied by WPO's weights.
      calibration: parameters of the gradient norms from which reward calibration (`calibrated`)
        takes its factor: the output head's, or all that are trained. none: no calibration.
      logits_sam: rho of logits-SAM: the loss's gradient is that at W + rho g / |g|, where g is its
        gradient in the output head W alone.
    """

    divergence: Divergence = REVERSE_KL
    log_probs: Literal["sum", "mean"] = "sum"
    tail_weight: float = 1.0
    importance: bool = False
    calibration: Literal["none", "head", "all"] = "none"
    logits_sam: float = 0.0

    def total(
        self, log_prob: Float[Array, "pairs 2 response"], length: Int[Array, "pairs 2"]
    ) -> Float[Array, "pairs 2"]:
        """The log-prob of each response from those of its tokens, 0 at padding."""
        if self.tail_weight == 1.0:
            return log_prob.sum(-1)
        shorter = jnp.min(length, axis=-1)[:, None, None]
        is_tail = jnp.arange(log_prob.shape[-1])[None, None] >= shorter
        return jnp.where(is_tail, self.tail_weight * log_prob, log_prob).sum(-1)

    def seen(self, pairs: PairLogProbs) -> PairLogProbs:
        """The pairs as losses see them."""
        pairs = dataclasses.replace(pairs, divergence=self.divergence)
        if self.log_probs == "sum":
            return pairs
        chosen, rejected = pairs.chosen_tokens, pairs.rejected_tokens
        return dataclasses.replace(
            pairs,
            chosen=pairs.chosen / chosen,
            rejected=pairs.rejected / rejected,
            reference_chosen=pairs.reference_chosen / chosen,
            reference_rejected=pairs.reference_rejected / rejected,
            chosen_length=jnp.ones_like(pairs.chosen_length),
            rejected_length=jnp.ones_like(pairs.rejected_length),
        )


NO_SWITCHES = Switches()
"""Losses see the log-probs as they are."""


def importance_weights(
    log_prob: Float[Array, "pairs 2 response"],
    collision: Float[Array, "pairs 2 response"],
    length: Int[Array, "pairs 2"],
) -> Float[Array, " pairs"]:
    r"""WPO's weight of a pair: how likely the policy itself is to write its two responses.

    .. math:: w = w_w w_l, \quad
              w_y = \exp\Bigl(\frac{1}{|y|} \sum_t \bigl(\log\pi_t(y_t) - \log\sum_v \pi_t(v)^2
              \bigr)\Bigr)

    Args:
      log_prob: log-probs of the tokens of chosen and rejected, in nats, 0 at padding.
      collision: log-probability that two draws of the next token agree, 0 at padding.
      length: number of tokens of each response.

    Returns:
      One weight per pair, without gradient. It is 1 where the policy is uniform.

    References:
      Zhou et al., 2024, arXiv:2406.11827, equation 2 and the sampled alignment of its section 3.
    """
    tokens = jnp.maximum(length, 1).astype(log_prob.dtype)
    aligned = (log_prob - collision).sum(-1) / tokens
    return jax.lax.stop_gradient(jnp.exp(aligned.sum(-1)))
