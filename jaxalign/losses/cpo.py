"""Contrastive preference optimisation."""

import jax
from jaxtyping import Array, Float

from jaxalign.losses.checks import non_negative, positive
from jaxalign.losses.pairs import PairLogProbs


def cpo(pairs: PairLogProbs, *, beta: float = 0.1, lambda_: float = 1.0) -> Float[Array, " pairs"]:
    r"""DPO with a uniform reference and a supervised term on the chosen response.

    .. math:: \ell = -\log\sigma\bigl(\beta (\log\pi_w - \log\pi_l)\bigr) - \lambda \log\pi_w

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: inverse temperature, > 0. Default 0.1: the paper's.
      lambda_: weight of the supervised term, >= 0. Default 1: the paper's, where the term is the
        sum over tokens (TRL averages it over the batch's tokens).

    Returns:
      One loss per pair, [pairs], not reduced. With lambda 0 and equal log-probabilities, log 2.

    Slopes:
      d_w / d_l = 1 + lambda / (beta sigma(-beta (log pi_w - log pi_l))), growing with the gap

    References:
      Xu et al., 2024, arXiv:2401.08417.
    """
    positive(beta=beta)
    non_negative(lambda_=lambda_)
    return -jax.nn.log_sigmoid(beta * (pairs.chosen - pairs.rejected)) - lambda_ * pairs.chosen
