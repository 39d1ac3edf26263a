"""Token-level direct preference optimisation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign.losses.checks import non_negative, positive
from jaxalign.losses.tokens import TokenLogProbs


def tdpo1(tokens: TokenLogProbs, *, beta: float = 0.1) -> Float[Array, " pairs"]:
    r"""DPO whose margin is offset by the difference of the responses' sequential divergences.

    .. math:: \ell = -\log\sigma\bigl(\beta (h - (K_l - K_w))\bigr), \quad
              K = \sum_t \mathrm{KL}(\pi^{ref}_t \,\Vert\, \pi_t), \quad
              h = (\log\pi_w - \log\pi^{ref}_w) - (\log\pi_l - \log\pi^{ref}_l)

    Args:
      tokens: per-token log-probabilities and divergences, in nats; every field is
        [pairs, tokens].
      beta: inverse temperature of the implicit reward, > 0. Default 0.1: the paper's.

    Returns:
      One loss per pair, [pairs], not reduced. At policy = reference it is log 2.

    Slopes:
      d_w / d_l = 1 in the log-probabilities; the divergences add terms of their own

    References:
      Zeng et al., 2024, arXiv:2404.11999 (TDPO1).
    """
    positive(beta=beta)
    chosen_kl = _masked_sum(tokens.chosen_kl, tokens.chosen_mask)
    rejected_kl = _masked_sum(tokens.rejected_kl, tokens.rejected_mask)
    return -jax.nn.log_sigmoid(beta * (_margin(tokens) - (rejected_kl - chosen_kl)))


def tdpo2(
    tokens: TokenLogProbs, *, beta: float = 0.1, alpha: float = 0.5
) -> Float[Array, " pairs"]:
    r"""TDPO1 with the divergence term weighted, and without gradient on the chosen response's.

    .. math:: \ell = -\log\sigma\bigl(\beta (h - \alpha (K_l - \mathrm{sg}(K_w)))\bigr), \quad
              K = \sum_t \mathrm{KL}(\pi^{ref}_t \,\Vert\, \pi_t), \quad
              h = (\log\pi_w - \log\pi^{ref}_w) - (\log\pi_l - \log\pi^{ref}_l)

    Args:
      tokens: per-token log-probabilities and divergences, in nats; every field is
        [pairs, tokens].
      beta: inverse temperature of the implicit reward, > 0. Default 0.1: the paper's.
      alpha: weight of the difference of divergences, >= 0. Default 0.5: the paper's. At 0 the
        loss is DPO's.

    Returns:
      One loss per pair, [pairs], not reduced. At policy = reference it is log 2.

    Slopes:
      d_w / d_l = 1 in the log-probabilities; the rejected divergence adds a term of its own

    References:
      Zeng et al., 2024, arXiv:2404.11999 (TDPO2).
    """
    positive(beta=beta)
    non_negative(alpha=alpha)
    chosen_kl = jax.lax.stop_gradient(_masked_sum(tokens.chosen_kl, tokens.chosen_mask))
    rejected_kl = _masked_sum(tokens.rejected_kl, tokens.rejected_mask)
    return -jax.nn.log_sigmoid(beta * (_margin(tokens) - alpha * (rejected_kl - chosen_kl)))


def _masked_sum(
    values: Float[Array, "pairs tokens"], mask: Bool[Array, "pairs tokens"]
) -> Float[Array, " pairs"]:
    return jnp.sum(jnp.where(mask, values, 0.0), axis=-1)


def _margin(tokens: TokenLogProbs) -> Float[Array, " pairs"]:
    chosen = _masked_sum(tokens.chosen - tokens.reference_chosen, tokens.chosen_mask)
    return chosen - _masked_sum(tokens.rejected - tokens.reference_rejected, tokens.rejected_mask)
