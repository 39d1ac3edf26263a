"""Calibrated direct preference optimisation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.losses.checks import positive
from jaxalign.losses.pairs import PairLogProbs


def cal_dpo(pairs: PairLogProbs, *, beta: float = 0.002) -> Float[Array, " pairs"]:
    r"""Logistic loss on the margin, with each log-ratio pulled to its own absolute target.

    .. math:: \ell = -\log\sigma(r_w - r_l) + \tfrac12 \bigl(r_w - \tfrac{1}{2\beta}\bigr)^2
                     + \tfrac12 \bigl(r_l + \tfrac{1}{2\beta}\bigr)^2, \quad
              r = \log\pi - \log\pi^{ref}

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: strength of the pull to the reference, > 0; targets are +-1 / (2 beta) nats. Default
        0.002: the authors' configuration.

    Returns:
      One loss per pair, [pairs], not reduced. At policy = reference, log 2 + 1 / (4 beta^2).

    Slopes:
      d_w / d_l = (sigma(-h) + 1 / (2 beta) - r_w) / (sigma(-h) + 1 / (2 beta) + r_l)

    References:
      Xiao et al., 2024, arXiv:2412.14516, with the factors of the authors' code.
    """
    positive(beta=beta)
    target = 1 / (2 * beta)
    chosen = jnp.square(pairs.chosen_log_ratio - target)
    rejected = jnp.square(pairs.rejected_log_ratio + target)
    return -jax.nn.log_sigmoid(pairs.margin) + 0.5 * (chosen + rejected)
