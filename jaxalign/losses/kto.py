"""Kahneman-Tversky optimisation, paired and unpaired."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign.losses.checks import non_negative, positive
from jaxalign.losses.pairs import PairLogProbs
from jaxalign.losses.statistics import Statistics, with_statistics
from jaxalign.losses.weighted import weighted_mean


def kto_statistics(
    pairs: PairLogProbs, weight: Float[Array, " pairs"] | None = None
) -> dict[str, Array]:
    """Zero point of the paired form: `kto_kl` over chosen and rejected responses alike."""
    both = jnp.concatenate([pairs.chosen_log_ratio, pairs.rejected_log_ratio])
    doubled = None if weight is None else jnp.concatenate([weight, weight])
    return {"kl": kto_kl(both, doubled)}


@with_statistics(Statistics(batch=kto_statistics))
def kto(
    pairs: PairLogProbs,
    *,
    beta: float = 0.1,
    lambda_desirable: float = 1.0,
    lambda_undesirable: float = 1.0,
    kl: Float[Array, ""] | None = None,
) -> Float[Array, " pairs"]:
    r"""Prospect-theoretic value lost by chosen and by rejected, against a common zero point.

    .. math:: \ell = \lambda_D \sigma\bigl(-\beta (r_w - z_0)\bigr)
                     + \lambda_U \sigma\bigl(-\beta (z_0 - r_l)\bigr), \quad
              r = \log\pi - \log\pi^{ref}

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: inverse temperature of the implicit reward, > 0. Default 0.1: the paper's.
      lambda_desirable: weight lambda_D of chosen responses, >= 0. Default 1: the paper's.
      lambda_undesirable: weight lambda_U of rejected responses, >= 0. Default 1: the paper's.
      kl: zero point z_0 in nats, >= 0, a scalar without gradient: a batch statistic. Default None:
        `kto_kl` of all log-ratios of the pairs given (`kto_statistics`).

    Returns:
      One loss per pair, [pairs], not reduced. At policy = reference it is 1.

    Slopes:
      d_w / d_l = lambda_D sigma'(beta (r_w - z_0)) / (lambda_U sigma'(beta (z_0 - r_l)))

    References:
      Ethayarajh et al., 2024, arXiv:2402.01306. Both responses of every pair are used, as in
      TRL's former `kto_pair`, but with one zero point.
    """
    positive(beta=beta)
    non_negative(lambda_desirable=lambda_desirable, lambda_undesirable=lambda_undesirable)
    if kl is None:
        kl = kto_statistics(pairs)["kl"]
    desirable = jax.nn.sigmoid(-beta * (pairs.chosen_log_ratio - kl))
    undesirable = jax.nn.sigmoid(-beta * (kl - pairs.rejected_log_ratio))
    return lambda_desirable * desirable + lambda_undesirable * undesirable


def kto_kl(
    log_ratios: Float[Array, " responses"], weight: Float[Array, " responses"] | None = None
) -> Float[Array, ""]:
    r"""Batch estimate of the divergence between policy and reference: KTO's zero point.

    .. math:: z_0 = \max\Bigl(0, \frac{\sum_i w_i r_i}{\sum_i w_i}\Bigr), \quad
              r = \log\pi - \log\pi^{ref}

    Args:
      log_ratios: log-ratios in nats, [responses]. The paper takes responses that belong to other
        prompts of the batch; the paired form takes the pairs' own.
      weight: weight of each response, [responses]; 0 for padding rows. Default
        None: equal weights.

    Returns:
      A scalar in nats, >= 0, through which no gradient flows.

    References:
      Ethayarajh et al., 2024, arXiv:2402.01306, section 4.
    """
    return jax.lax.stop_gradient(jnp.maximum(weighted_mean(log_ratios, weight), 0.0))


def kto_unpaired(
    log_probs: Float[Array, " responses"],
    reference_log_probs: Float[Array, " responses"],
    desirable: Bool[Array, " responses"],
    *,
    kl: Float[Array, ""],
    beta: float = 0.1,
    lambda_desirable: float = 1.0,
    lambda_undesirable: float = 1.0,
) -> Float[Array, " responses"]:
    r"""KTO on single responses, each labelled desirable or not.

    .. math:: \ell = \lambda_D \sigma\bigl(-\beta (r - z_0)\bigr) \text{ if desirable, else }
                     \lambda_U \sigma\bigl(-\beta (z_0 - r)\bigr), \quad
              r = \log\pi - \log\pi^{ref}

    Args:
      log_probs: log-probabilities under the policy, summed over tokens, in nats, [responses].
      reference_log_probs: the same under the reference, [responses].
      desirable: whether the response is a desirable one, [responses].
      kl: zero point z_0 in nats, a scalar: `kto_kl` of mismatched responses' log-ratios.
      beta: inverse temperature of the implicit reward, > 0. Default 0.1: the paper's.
      lambda_desirable: weight lambda_D, >= 0. Default 1; the paper asks for
        lambda_D n_D / (lambda_U n_U) in [1, 4/3] where the counts n are unequal.
      lambda_undesirable: weight lambda_U, >= 0. Default 1.

    Returns:
      One loss per response, [responses], not reduced. At policy = reference it is 1/2.

    References:
      Ethayarajh et al., 2024, arXiv:2402.01306, section 4.
    """
    positive(beta=beta)
    non_negative(lambda_desirable=lambda_desirable, lambda_undesirable=lambda_undesirable)
    above = log_probs - reference_log_probs - jax.lax.stop_gradient(kl)
    return jnp.where(
        desirable,
        lambda_desirable * jax.nn.sigmoid(-beta * above),
        lambda_undesirable * jax.nn.sigmoid(beta * above),
    )
