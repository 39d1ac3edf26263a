"""Self-play preference optimisation with hard labels, and with estimated win rates."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.losses.checks import positive
from jaxalign.losses.pairs import PairLogProbs


def sppo(pairs: PairLogProbs, *, beta: float = 0.001) -> Float[Array, " pairs"]:
    r"""Squared distance of each log-ratio to its own target: chosen up, rejected down.

    .. math:: \ell = \bigl(r_w - \tfrac{1}{2\beta}\bigr)^2
                     + \bigl(r_l + \tfrac{1}{2\beta}\bigr)^2, \quad
              r = \log\pi - \log\pi^{ref}

    The reference is the previous iterate, and the preference is 1 for chosen, 0 for rejected.

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: strength of the pull to the reference, > 0; targets are +-1 / (2 beta) nats. Default
        0.001: the paper's step size eta = 1 / beta = 1000.

    Returns:
      One loss per pair, [pairs], not reduced. At policy = reference it is 1 / (2 beta^2).

    Slopes:
      d_w / d_l = (1 / (2 beta) - r_w) / (1 / (2 beta) + r_l)

    References:
      Wu et al., 2024, arXiv:2405.00675, eq. 4.7 with hard labels (the authors' code halves it).
    """
    positive(beta=beta)
    target = 1 / (2 * beta)
    return jnp.square(pairs.chosen_log_ratio - target) + jnp.square(
        pairs.rejected_log_ratio + target
    )


def sppo_soft(
    pairs: PairLogProbs,
    chosen_wins: Float[Array, " pairs"],
    rejected_wins: Float[Array, " pairs"],
    *,
    beta: float = 0.001,
) -> Float[Array, " pairs"]:
    r"""SPPO whose targets are the responses' own win rates against the previous policy.

    .. math:: \ell = \bigl(r_w - \tfrac{P_w - 1/2}{\beta}\bigr)^2
                     + \bigl(r_l - \tfrac{P_l - 1/2}{\beta}\bigr)^2, \quad
              r = \log\pi - \log\pi^{ref}, \quad
              P = P(y \succ \pi^{ref})

    The reference is the previous iterate; win rates are means over other samples of it.

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      chosen_wins: probability P_w that the chosen response beats a sample of the previous
        iterate, in [0, 1], [pairs].
      rejected_wins: the same, P_l, of the rejected response, [pairs].
      beta: strength of the pull to the reference, > 0; the step size is 1 / beta. Default 0.001:
        the paper's.

    Returns:
      One loss per pair, [pairs], not reduced. With win rates 1 and 0 it is `sppo`.

    Slopes:
      d_w / d_l = ((P_w - 1/2) / beta - r_w) / (r_l - (P_l - 1/2) / beta)

    References:
      Wu et al., 2024, arXiv:2405.00675, eq. 4.7 (the authors' code halves it).
    """
    positive(beta=beta)
    return jnp.square(pairs.chosen_log_ratio - (chosen_wins - 0.5) / beta) + jnp.square(
        pairs.rejected_log_ratio - (rejected_wins - 0.5) / beta
    )
