"""Identity preference optimisation, on summed and on averaged log-probabilities."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.losses.checks import Strength, positive
from jaxalign.losses.pairs import PairLogProbs


def ipo(pairs: PairLogProbs, *, tau: Strength = 0.1) -> Float[Array, " pairs"]:
    r"""Squared distance between the summed log-ratio margin and its target 1 / (2 tau).

    .. math:: \ell = \bigl(h - \tfrac{1}{2\tau}\bigr)^2, \quad
              h = (\log\pi_w - \log\pi^{ref}_w) - (\log\pi_l - \log\pi^{ref}_l)

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      tau: strength of the pull to the reference, > 0; the target margin is 1 / (2 tau) nats.
        Default 0.1, the value common implementations share; the paper sweeps it.

    Returns:
      One loss per pair, [pairs], not reduced. At policy = reference it is 1 / (4 tau^2).

    Slopes:
      d_w / d_l = 1

    References:
      Azar et al., 2023, arXiv:2310.12036, eq. 17.
    """
    positive(tau=tau)
    return jnp.square(pairs.margin - 1 / (2 * tau))


def ipo_mean(pairs: PairLogProbs, *, tau: Strength = 0.1) -> Float[Array, " pairs"]:
    r"""IPO with each log-ratio averaged over its response's tokens: other libraries' IPO.

    .. math:: \ell = \Bigl(\frac{r_w}{L_w} - \frac{r_l}{L_l} - \frac{1}{2\tau}\Bigr)^2, \quad
              r = \log\pi - \log\pi^{ref}

    The paper sums, and only the sum keeps the paper's fixed point where lengths differ.

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      tau: strength of the pull to the reference, > 0; the target margin is 1 / (2 tau) nats per
        token. Default 0.1: TRL's.

    Returns:
      One loss per pair, [pairs], not reduced. At policy = reference it is 1 / (4 tau^2).

    Slopes:
      d_w / d_l = L_l / L_w

    References:
      Azar et al., 2023, arXiv:2310.12036, as in TRL's `DPOTrainer` with `loss_type="ipo"`.
    """
    positive(tau=tau)
    chosen = pairs.chosen_log_ratio / pairs.chosen_tokens
    rejected = pairs.rejected_log_ratio / pairs.rejected_tokens
    return jnp.square(chosen - rejected - 1 / (2 * tau))
