"""The f-divergence that ties the policy to its reference, as a score of log-ratios."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DivergenceName = Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"]
"""The divergences of `Divergence`."""
LARGEST = 80.0
"""Largest exponent: exp of it is finite in float32, as in TRL."""


@dataclass(frozen=True)
class Divergence:
    r"""A divergence of policy and reference; the implicit reward is beta times its score.

    .. math:: s(r) = f'(e^r), \quad r = \log\pi - \log\pi^{ref}

    The score is r for reverse KL (the usual one), 1 - exp(-r) for forward KL, log 2 + log sigma(r)
    for Jensen-Shannon, and (exp((alpha - 1) r) - 1) / (alpha - 1) for the alpha-divergence, which
    is forward KL at alpha = 0 and reverse KL at alpha = 1. Exponents are held below 80.

    Attributes:
      name: of the divergence.
      alpha: of the alpha-divergence.

    References:
      Wang et al., 2023, arXiv:2309.16240, table 1 and equation 7.
    """

    name: DivergenceName = "reverse_kl"
    alpha: float = 0.5

    def score(self, log_ratio: Float[Array, " pairs"]) -> Float[Array, " pairs"]:
        """The score of log-ratios in nats; 0 at 0, and it grows with them."""
        if self.name == "forward_kl":
            return -jnp.expm1(jnp.minimum(-log_ratio, LARGEST))
        if self.name == "jensen_shannon":
            return math.log(2.0) + jax.nn.log_sigmoid(log_ratio)
        if self.name == "alpha" and self.alpha != 1.0:
            slope = self.alpha - 1.0
            return jnp.expm1(jnp.minimum(slope * log_ratio, LARGEST)) / slope
        return log_ratio


REVERSE_KL = Divergence()
"""The usual one: the score is the log-ratio."""
