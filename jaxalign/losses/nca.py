"""Noise contrastive alignment."""

import jax
from jaxtyping import Array, Float

from jaxalign.losses.checks import positive
from jaxalign.losses.pairs import PairLogProbs


def nca(pairs: PairLogProbs, *, beta: float = 0.01) -> Float[Array, " pairs"]:
    r"""Contrasts chosen with noise and both responses with data: absolute rewards, not their gap.

    .. math:: \ell = -\log\sigma(\beta r_w) - \tfrac12 \log\sigma(-\beta r_w)
                     - \tfrac12 \log\sigma(-\beta r_l), \quad
              r = \log\pi - \log\pi^{ref}

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: inverse temperature of the implicit reward, > 0; the paper's alpha. Default 0.01: the
        paper's.

    Returns:
      One loss per pair, [pairs], not reduced. At policy = reference it is 2 log 2.

    Slopes:
      d_w / d_l = (2 - 3 sigma(beta r_w)) / sigma(beta r_l)

    References:
      Chen et al., 2024, arXiv:2402.05369, for two responses as in TRL's `nca_pair`.
    """
    positive(beta=beta)
    chosen, rejected = beta * pairs.chosen_log_ratio, beta * pairs.rejected_log_ratio
    noise = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * noise
