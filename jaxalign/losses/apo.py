"""Anchored preference optimisation."""

import jax
from jaxtyping import Array, Float

from jaxalign.losses.checks import positive
from jaxalign.losses.pairs import PairLogProbs


def apo_zero(pairs: PairLogProbs, *, beta: float = 0.1) -> Float[Array, " pairs"]:
    r"""Chosen up and rejected down, each anchored at the reference: for data better than the model.

    .. math:: \ell = \sigma(-\beta r_w) + \sigma(\beta r_l), \quad
              r = \log\pi - \log\pi^{ref}

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: inverse temperature of the implicit reward, > 0. Default 0.1: the paper's.

    Returns:
      One loss per pair, [pairs], not reduced, in (0, 2). At policy = reference it is 1.

    Slopes:
      d_w / d_l = sigma'(beta r_w) / sigma'(beta r_l)

    References:
      D'Oosterlinck et al., 2024, arXiv:2408.06266, eq. 7.
    """
    positive(beta=beta)
    unlikely_chosen = jax.nn.sigmoid(-beta * pairs.chosen_log_ratio)
    likely_rejected = jax.nn.sigmoid(beta * pairs.rejected_log_ratio)
    return unlikely_chosen + likely_rejected


def apo_down(pairs: PairLogProbs, *, beta: float = 0.1) -> Float[Array, " pairs"]:
    r"""Chosen down, rejected further down: for a model better than its data.

    .. math:: \ell = \sigma(\beta r_w) + \sigma(-\beta h), \quad
              h = r_w - r_l, \quad r = \log\pi - \log\pi^{ref}

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: inverse temperature of the implicit reward, > 0. Default 0.1: the paper's.

    Returns:
      One loss per pair, [pairs], not reduced, in (0, 2). At policy = reference it is 1.

    Slopes:
      d_w / d_l = 1 - sigma'(beta r_w) / sigma'(beta h): 0 at the reference

    References:
      D'Oosterlinck et al., 2024, arXiv:2408.06266, eq. 8.
    """
    positive(beta=beta)
    likely_chosen = jax.nn.sigmoid(beta * pairs.chosen_log_ratio)
    return likely_chosen + jax.nn.sigmoid(-beta * pairs.margin)
