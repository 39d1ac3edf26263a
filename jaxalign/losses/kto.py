"""Kahneman-Tversky optimisation, paired and unpaired."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.losses.batch_means import weighted_mean
from jaxalign.losses.checks import non_negative, positive
from jaxalign.losses.labelled import LabelledLogProbs
from jaxalign.losses.pairs import PairLogProbs
from jaxalign.losses.statistics import Statistics, with_statistics


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


def mismatched_kl(
    responses: LabelledLogProbs, weight: Float[Array, " responses"] | None = None
) -> dict[str, Array]:
    """Zero point of `kto_unpaired`: `kto_kl` over prompts with responses of other rows."""
    return {"kl": kto_kl(responses.mismatched_log_ratio, weight)}


@with_statistics(Statistics(batch=mismatched_kl, mismatched=True))
def kto_unpaired(
    responses: LabelledLogProbs,
    *,
    beta: float = 0.1,
    lambda_desirable: float = 1.0,
    lambda_undesirable: float = 1.0,
    kl: Float[Array, ""] | None = None,
) -> Float[Array, " responses"]:
    r"""KTO on single responses, each labelled desirable or not.

    .. math:: \ell = \lambda_D \sigma\bigl(-\beta (r - z_0)\bigr) \text{ if desirable, else }
                     \lambda_U \sigma\bigl(-\beta (z_0 - r)\bigr), \quad
              r = \log\pi - \log\pi^{ref}

    Args:
      responses: log-probabilities summed over response tokens, in nats; every field is [responses].
      beta: inverse temperature of the implicit reward, > 0. Default 0.1: the paper's.
      lambda_desirable: weight lambda_D, >= 0. Default 1. With n_D desirable and n_U undesirable
        responses, the paper asks for lambda_D n_D / (lambda_U n_U) in [1, 4/3]; the feedback stage
        sees to it where neither weight is set (`kto_weights`).
      lambda_undesirable: weight lambda_U, >= 0. Default 1.
      kl: zero point z_0 in nats, >= 0, a scalar without gradient: a batch statistic. Default None:
        `kto_kl` of the mismatched log-ratios of the responses given.

    Returns:
      One loss per response, [responses], not reduced. At policy = reference it is 1/2.

    References:
      Ethayarajh et al., 2024, arXiv:2402.01306, section 4.
    """
    positive(beta=beta)
    non_negative(lambda_desirable=lambda_desirable, lambda_undesirable=lambda_undesirable)
    if kl is None:
        kl = mismatched_kl(responses)["kl"]
    above = responses.log_ratio - jax.lax.stop_gradient(kl)
    return jnp.where(
        responses.desirable,
        lambda_desirable * jax.nn.sigmoid(-beta * above),
        lambda_undesirable * jax.nn.sigmoid(beta * above),
    )


def kto_weights(desirable: int, undesirable: int) -> tuple[float, float]:
    r"""KTO's weights for unequal numbers of labels: the smallest from 1 that satisfy the rule.

    .. math:: 1 \le \frac{\lambda_D n_D}{\lambda_U n_U} \le \tfrac43

    Args:
      desirable: n_D, number of desirable responses.
      undesirable: n_U, number of undesirable ones.

    Returns:
      lambda_D and lambda_U; one of them is 1. Both are 1 if a label is missing.

    References:
      Ethayarajh et al., 2024, arXiv:2402.01306, equation 9.
    """
    if not desirable or not undesirable:
        return 1.0, 1.0
    ratio = desirable / undesirable
    return max(1.0, 1 / ratio), max(1.0, ratio * 3 / 4)
