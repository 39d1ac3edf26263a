"""Efficient exact optimisation."""

import math

import jax
from jaxtyping import Array, Float

from jaxalign.errors import UserError
from jaxalign.losses.checks import positive
from jaxalign.losses.pairs import PairLogProbs


def exo(
    pairs: PairLogProbs, *, beta: float = 0.1, label_smoothing: float = 0.001
) -> Float[Array, " pairs"]:
    r"""Reverse divergence of the policy's preference from the label's, DPO's being the forward one.

    .. math:: \ell = \sigma(\beta h) \log\frac{\sigma(\beta h)}{1 - \epsilon}
                     + \sigma(-\beta h) \log\frac{\sigma(-\beta h)}{\epsilon}, \quad
              h = (\log\pi_w - \log\pi^{ref}_w) - (\log\pi_l - \log\pi^{ref}_l)

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: inverse temperature of the implicit reward, > 0. Default 0.1: the paper's.
      label_smoothing: probability epsilon that the label gives to the rejected response, in
        (0, 0.5); the divergence from a label without doubt is infinite. Default 0.001: TRL's.

    Returns:
      One loss per pair, [pairs], not reduced, >= 0. It is 0 where sigma(beta h) = 1 - epsilon.

    Slopes:
      d_w / d_l = 1

    References:
      Ji et al., 2024, arXiv:2402.00856, section 3.2, for two responses as in TRL's `exo_pair`.
    """
    positive(beta=beta)
    if not 0 < label_smoothing < 0.5:
        raise UserError(f"label_smoothing = {label_smoothing}: must be in (0, 0.5) for exo")
    scaled = beta * pairs.margin
    agree = jax.nn.log_sigmoid(scaled) - math.log1p(-label_smoothing)
    flipped = jax.nn.log_sigmoid(-scaled) - math.log(label_smoothing)
    return jax.nn.sigmoid(scaled) * agree + jax.nn.sigmoid(-scaled) * flipped
