"""Preference optimisation by inverse perplexity."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.losses.pairs import PairLogProbs


def simper(pairs: PairLogProbs) -> Float[Array, " pairs"]:
    r"""Inverse perplexity of rejected minus that of chosen: no reference, no hyperparameter.

    .. math:: \ell = \exp\Bigl(\frac{\log\pi_l}{L_l}\Bigr) - \exp\Bigl(\frac{\log\pi_w}{L_w}\Bigr)

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].

    Returns:
      One loss per pair, [pairs], not reduced, in (-1, 1). At equal means it is 0.

    Slopes:
      d_w / d_l = (L_l / L_w) exp(log pi_w / L_w - log pi_l / L_l)

    References:
      Xiao et al., 2025, arXiv:2502.00883.
    """
    return jnp.exp(pairs.rejected_mean) - jnp.exp(pairs.chosen_mean)
