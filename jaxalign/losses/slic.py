"""Hinge losses: sequence likelihood calibration, without and with a reference."""

import jax
from jaxtyping import Array, Float

from jaxalign.losses.checks import Strength, non_negative, positive
from jaxalign.losses.pairs import PairLogProbs


def slic(
    pairs: PairLogProbs, *, delta: float = 1.0, lambda_: float = 0.1
) -> Float[Array, " pairs"]:
    r"""Hinge on the gap of log-probabilities, with a pull to the chosen response; no reference.

    .. math:: \ell = \max(0, \delta - \log\pi_w + \log\pi_l) - \lambda \log\pi_w

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      delta: gap in nats beyond which the hinge rests, > 0. Default 1: the paper's.
      lambda_: weight of the supervised term on the chosen response, >= 0; 0 switches it off.
        Default 0.1: the HALOs library's; the paper's value is not known to us.

    Returns:
      One loss per pair, [pairs], not reduced. Where the gap is beyond delta it is
      -lambda log pi_w.

    Slopes:
      d_w / d_l = 1 + lambda while the hinge is active; infinite once it rests (d_l = 0)

    References:
      Zhao et al., 2023, arXiv:2305.10425.
    """
    positive(delta=delta)
    non_negative(lambda_=lambda_)
    return jax.nn.relu(delta - pairs.chosen + pairs.rejected) - lambda_ * pairs.chosen


def slic_norm(
    pairs: PairLogProbs, *, beta: Strength = 0.1, delta: float = 1.0
) -> Float[Array, " pairs"]:
    r"""Hinge on the margin between the implicit rewards: SLiC normalised by the reference.

    .. math:: \ell = \max(0, \delta - \beta h), \quad
              h = (\log\pi_w - \log\pi^{ref}_w) - (\log\pi_l - \log\pi^{ref}_l)

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: scale of the margin, > 0: RSO's gamma, and online preference optimisation's tau.
        Default 0.1: DPO's (RSO: 0.05).
      delta: scaled margin beyond which the hinge rests, > 0. Default 1: the paper's.

    Returns:
      One loss per pair, [pairs], not reduced. At policy = reference it is delta.

    Slopes:
      d_w / d_l = 1 while the hinge is active; both are 0 once it rests

    References:
      Liu et al., 2023, arXiv:2309.06657 (hinge-norm).
    """
    positive(beta=beta, delta=delta)
    return jax.nn.relu(delta - beta * pairs.margin)
