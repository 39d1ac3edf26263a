"""DPO-positive, the loss of Smaug."""

import jax
from jaxtyping import Array, Float

from jaxalign.losses.checks import non_negative, positive
from jaxalign.losses.pairs import PairLogProbs


def dpop(
    pairs: PairLogProbs, *, beta: float = 0.1, lambda_: float = 50.0
) -> Float[Array, " pairs"]:
    r"""DPO with a penalty inside the sigmoid where the chosen response fell below the reference.

    .. math:: \ell = -\log\sigma\bigl(\beta (h - \lambda \max(0, -r_w))\bigr), \quad
              h = r_w - r_l, \quad r = \log\pi - \log\pi^{ref}

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: inverse temperature of the implicit reward, > 0. Default 0.1: DPO's.
      lambda_: weight of the penalty, >= 0. Default 50: the gradient-entanglement code's
        (arXiv:2410.13828). At 0 the loss is DPO's.

    Returns:
      One loss per pair, [pairs], not reduced. At policy = reference it is log 2.

    Slopes:
      d_w / d_l = 1 + lambda while chosen is below the reference, else 1

    References:
      Pal et al., 2024, arXiv:2402.13228.
    """
    positive(beta=beta)
    non_negative(lambda_=lambda_)
    fallen = jax.nn.relu(-pairs.chosen_log_ratio)
    return -jax.nn.log_sigmoid(beta * (pairs.margin - lambda_ * fallen))
