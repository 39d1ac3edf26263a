"""Simple preference optimisation."""

import jax
from jaxtyping import Array, Float

from jaxalign.losses.checks import positive
from jaxalign.losses.pairs import PairLogProbs


def simpo(pairs: PairLogProbs, *, beta: float = 2.0, gamma: float = 1.0) -> Float[Array, " pairs"]:
    r"""Logistic loss on the gap of mean log-probabilities beyond a target; no reference.

    .. math:: \ell = -\log\sigma\Bigl(\frac{\beta}{L_w} \log\pi_w - \frac{\beta}{L_l} \log\pi_l
                     - \gamma\Bigr)

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: scale of the mean log-probability, > 0. Default 2: the paper's range is 2 to 10.
      gamma: target reward margin. Default 1: gamma / beta = 0.5, the authors' starting point.

    Returns:
      One loss per pair, [pairs], not reduced. At equal means it is log(1 + exp(gamma)).

    Slopes:
      d_w / d_l = L_l / L_w

    References:
      Meng et al., 2024, arXiv:2405.14734.
    """
    positive(beta=beta)
    return -jax.nn.log_sigmoid(beta * (pairs.chosen_mean - pairs.rejected_mean) - gamma)
