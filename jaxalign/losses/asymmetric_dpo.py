"""DPO that treats chosen and rejected unequally: rejected shifted, gated, bounded or scaled."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.errors import UserError
from jaxalign.losses.checks import positive
from jaxalign.losses.pairs import PairLogProbs


def dpo_shift(
    pairs: PairLogProbs, *, beta: float = 0.1, lambda_: float = 0.95
) -> Float[Array, " pairs"]:
    r"""DPO with the rejected response's reward shrunk by a constant factor.

    .. math:: \ell = -\log\sigma\bigl(\beta (r_w - \lambda r_l)\bigr), \quad
              r = \log\pi - \log\pi^{ref}

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: inverse temperature of the implicit reward, > 0. Default 0.1: the authors' code's.
      lambda_: factor f(lambda) on the rejected reward, > 0; at 1 the loss is DPO's. Default
        0.95: what the paper's summary recommends. Its schedules vary it over the run.

    Returns:
      One loss per pair, [pairs], not reduced. At policy = reference it is log 2.

    Slopes:
      d_w / d_l = 1 / lambda

    References:
      Yang et al., 2025, arXiv:2502.07599, eq. 3.
    """
    positive(beta=beta, lambda_=lambda_)
    shifted = pairs.chosen_log_ratio - lambda_ * pairs.rejected_log_ratio
    return -jax.nn.log_sigmoid(beta * shifted)


def minor_dpo(pairs: PairLogProbs, *, beta: float = 0.1) -> Float[Array, " pairs"]:
    r"""DPO that pushes the rejected response down no further than the reference has it.

    .. math:: \ell = -\log\sigma\bigl(\beta (r_w - \max(0, r_l))\bigr), \quad
              r = \log\pi - \log\pi^{ref}

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: inverse temperature of the implicit reward, > 0. Default 0.1: DPO's.

    Returns:
      One loss per pair, [pairs], not reduced. At policy = reference it is log 2.

    Slopes:
      d_w / d_l = 1 while rejected is above the reference; infinite below it (d_l = 0)

    References:
      Xie et al., 2024, arXiv:2408.09834.
    """
    positive(beta=beta)
    penalty = jax.nn.relu(pairs.rejected_log_ratio)
    return -jax.nn.log_sigmoid(beta * (pairs.chosen_log_ratio - penalty))


def bdpo(pairs: PairLogProbs, *, beta: float = 0.1, lambda_: float = 0.5) -> Float[Array, " pairs"]:
    r"""DPO with the rejected response scored by a mixture of policy and reference: a bounded push.

    .. math:: \ell = -\log\sigma\Bigl(\beta r_w - \beta \log\bigl(\lambda e^{r_l} + 1 - \lambda
                     \bigr)\Bigr), \quad
              r = \log\pi - \log\pi^{ref}

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: inverse temperature of the implicit reward, > 0. Default 0.1: DPO's.
      lambda_: weight of the policy in the mixture, in (0, 1]; at 1 the loss is DPO's. Default
        0.5: the best of the paper's ablation.

    Returns:
      One loss per pair, [pairs], not reduced. At policy = reference it is log 2.

    Slopes:
      d_w / d_l = 1 + (1 - lambda) / (lambda exp(r_l)), growing as rejected falls

    References:
      Cho et al., 2025, arXiv:2506.12725.
    """
    positive(beta=beta)
    if not 0 < lambda_ <= 1:
        raise UserError(f"lambda_ = {lambda_}: must be in (0, 1], the weight of the policy")
    log_reference_weight = math.log1p(-lambda_) if lambda_ < 1 else -math.inf
    mixed = jnp.logaddexp(math.log(lambda_) + pairs.rejected_log_ratio, log_reference_weight)
    return -jax.nn.log_sigmoid(beta * (pairs.chosen_log_ratio - mixed))


def mappo(
    pairs: PairLogProbs,
    *,
    beta: float = 0.1,
    delta_r: float | Float[Array, " pairs"] = 0.5,
) -> Float[Array, " pairs"]:
    r"""Maximum a posteriori DPO: the rejected reward counts by a prior gap of rewards.

    .. math:: \ell = -\log\sigma\bigl(\beta (r_w - \Delta_r r_l)\bigr), \quad
              r = \log\pi - \log\pi^{ref}

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: inverse temperature of the implicit reward, > 0. Default 0.1: DPO's.
      delta_r: gap between the rewards, each in [0, 1], that an oracle gives to chosen and to
        rejected: one per pair, [pairs], or one for all. Default 0.5, a stand-in of ours for data
        without rewards; the paper has it from a reward model. At 1 the loss is DPO's.

    Returns:
      One loss per pair, [pairs], not reduced. At policy = reference it is log 2.

    Slopes:
      d_w / d_l = 1 / Delta_r

    References:
      Lan et al., 2025, arXiv:2507.21183, eq. 8.
    """
    positive(beta=beta)
    calibrated = pairs.chosen_log_ratio - delta_r * pairs.rejected_log_ratio
    return -jax.nn.log_sigmoid(beta * calibrated)
