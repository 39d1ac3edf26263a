"""Rank responses to align with human feedback."""

import jax
from jaxtyping import Array, Float

from jaxalign.losses.checks import non_negative
from jaxalign.losses.pairs import PairLogProbs


def rrhf(pairs: PairLogProbs, *, lambda_: float = 1.0) -> Float[Array, " pairs"]:
    r"""Ranking hinge on mean log-probabilities, with a supervised term on the chosen response.

    .. math:: \ell = \max\Bigl(0, \frac{\log\pi_l}{L_l} - \frac{\log\pi_w}{L_w}\Bigr)
                     - \lambda \log\pi_w

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      lambda_: weight of the supervised term, >= 0. Default 1: the paper adds the two terms.

    Returns:
      One loss per pair, [pairs], not reduced. Where chosen is ranked first, -lambda log pi_w.

    Slopes:
      d_w / d_l = L_l / L_w + lambda L_l while misranked; infinite otherwise (d_l = 0)

    References:
      Yuan et al., 2023, arXiv:2304.05302.
    """
    non_negative(lambda_=lambda_)
    return jax.nn.relu(pairs.rejected_mean - pairs.chosen_mean) - lambda_ * pairs.chosen
