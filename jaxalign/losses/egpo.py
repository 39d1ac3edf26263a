"""The regression of extragradient preference optimisation: margins to differences of win rates."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.losses.checks import Strength, positive
from jaxalign.losses.pairs import PairLogProbs


def egpo(
    pairs: PairLogProbs,
    chosen_wins: Float[Array, " pairs"],
    rejected_wins: Float[Array, " pairs"],
    *,
    tau: Strength = 0.1,
) -> Float[Array, " pairs"]:
    r"""Online IPO whose responses are compared with an opponent's instead of with each other.

    .. math:: \ell = \Bigl(h - \frac{P_y - P_{y'}}{\tau}\Bigr)^2, \quad
              h = (\log\pi_y - \log\pi^{ref}_y) - (\log\pi_{y'} - \log\pi^{ref}_{y'}), \quad
              P_y = P(y \succ y''), \quad
              y'' \sim \text{opponent}

    With responses from any law of full support and the policy as opponent, a step down its gradient
    is a step of mirror descent. The extragradient steps twice from the same policy: first against
    that policy, then against the result of the first step (`jaxalign.games.extragradient`).

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      chosen_wins: probability P_y that the first response beats the opponent's, in [0, 1], [pairs].
      rejected_wins: the same of the second response, [pairs].
      tau: strength of the regularisation to the reference, > 0. Default 0.1: the authors' for
        language models.

    Returns:
      One loss per pair, [pairs], not reduced.

    Slopes:
      d_w / d_l = 1

    References:
      Zhou et al., 2025, arXiv:2503.08942.
    """
    positive(tau=tau)
    return jnp.square(pairs.margin - (chosen_wins - rejected_wins) / tau)
