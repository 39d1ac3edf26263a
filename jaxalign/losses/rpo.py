"""DPO with a supervised term: iterative reasoning preference optimisation."""

import jax
from jaxtyping import Array, Float

from jaxalign.losses.checks import non_negative, positive
from jaxalign.losses.pairs import PairLogProbs


def rpo(pairs: PairLogProbs, *, beta: float = 0.1, alpha: float = 1.0) -> Float[Array, " pairs"]:
    r"""DPO plus the negative log-likelihood per token of the chosen response.

    .. math:: \ell = -\log\sigma(\beta h) - \alpha \frac{\log\pi_w}{L_w}, \quad
              h = (\log\pi_w - \log\pi^{ref}_w) - (\log\pi_l - \log\pi^{ref}_l)

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: inverse temperature of the implicit reward, > 0. Default 0.1: the paper's.
      alpha: weight of the supervised term, >= 0. Default 1: the paper's. At 0 it is DPO.

    Returns:
      One loss per pair, [pairs], not reduced. At policy = reference, log 2 - alpha a_w / L_w.

    Slopes:
      d_w / d_l = 1 + alpha / (L_w beta sigma(-beta h))

    References:
      Pang et al., 2024, arXiv:2404.19733.
    """
    positive(beta=beta)
    non_negative(alpha=alpha)
    return -jax.nn.log_sigmoid(beta * pairs.margin) - alpha * pairs.chosen_mean
