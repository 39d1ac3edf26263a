"""Discovered preference optimisation: the log-ratio modulated loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.losses.checks import positive
from jaxalign.losses.pairs import PairLogProbs


def discopop(
    pairs: PairLogProbs, *, beta: float = 0.05, tau: float = 0.05
) -> Float[Array, " pairs"]:
    r"""Logistic loss at negative margins, exponential loss at positive ones, mixed by the margin.

    .. math:: \ell = -(1 - m) \log\sigma(\beta h) + m e^{-\beta h}, \quad
              m = \sigma(\beta h / \tau), \quad
              h = (\log\pi_w - \log\pi^{ref}_w) - (\log\pi_l - \log\pi^{ref}_l)

    Found by a language model's search. It is not convex: near h = 0 it has a local bump.

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: inverse temperature of the implicit reward, > 0. Default 0.05: the paper's.
      tau: temperature of the mixing, > 0. Default 0.05: the paper's. Above 1 the exponential
        branch wins at very negative margins, and overflows there.

    Returns:
      One loss per pair, [pairs], not reduced. At policy = reference it is (1 + log 2) / 2.

    Slopes:
      d_w / d_l = 1

    References:
      Lu et al., 2024, arXiv:2406.08414, eq. 5.
    """
    positive(beta=beta, tau=tau)
    scaled = beta * pairs.margin
    logistic = -jax.nn.sigmoid(-scaled / tau) * jax.nn.log_sigmoid(scaled)
    # In one exponent: apart, e^(-beta h) overflows where the mixing weight is zero anyway.
    exponential = jnp.exp(jax.nn.log_sigmoid(scaled / tau) - scaled)
    return logistic + exponential
