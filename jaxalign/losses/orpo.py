"""Odds-ratio preference optimisation."""

import jax
from jaxtyping import Array, Float

from jaxalign.losses.checks import non_negative
from jaxalign.losses.log_arithmetic import log_odds
from jaxalign.losses.pairs import PairLogProbs


def orpo(pairs: PairLogProbs, *, lambda_: float = 0.1) -> Float[Array, " pairs"]:
    r"""Supervised loss on the chosen response plus a logistic loss on the ratio of odds.

    .. math:: \ell = -\bar a_w - \lambda \log\sigma\bigl(o(\bar a_w) - o(\bar a_l)\bigr), \quad
              \bar a = \frac{\log\pi}{L}, \quad o(x) = x - \log(1 - e^x)

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      lambda_: weight of the odds-ratio term, >= 0. Default 0.1: the paper's.

    Returns:
      One loss per pair, [pairs], not reduced. At equal means it is -a_w / L_w + lambda log 2.

    Slopes:
      d_w / d_l = (1 + lambda s / (1 - exp(a_w / L_w))) / L_w divided by
      (lambda s / (1 - exp(a_l / L_l))) / L_l, with s = sigma(minus the log odds ratio)

    References:
      Hong et al., 2024, arXiv:2403.07691.
    """
    non_negative(lambda_=lambda_)
    log_odds_ratio = log_odds(pairs.chosen_mean) - log_odds(pairs.rejected_mean)
    return -pairs.chosen_mean - lambda_ * jax.nn.log_sigmoid(log_odds_ratio)
