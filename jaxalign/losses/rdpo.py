"""DPO with a penalty on length."""

import jax
from jaxtyping import Array, Float

from jaxalign.losses.checks import non_negative, positive
from jaxalign.losses.pairs import PairLogProbs


def rdpo(pairs: PairLogProbs, *, beta: float = 0.1, alpha: float = 0.2) -> Float[Array, " pairs"]:
    r"""DPO whose margin is offset by the difference in length, so that length earns nothing.

    .. math:: \ell = -\log\sigma\bigl(\beta h + \alpha (L_w - L_l)\bigr), \quad
              h = (\log\pi_w - \log\pi^{ref}_w) - (\log\pi_l - \log\pi^{ref}_l)

    A chosen response that is the longer one is already partly explained, and pulls less.

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: inverse temperature of the implicit reward, > 0. Default 0.1: DPO's.
      alpha: reward per token of length, >= 0. Default 0.2: the summarisation value of the
        gradient-entanglement code (arXiv:2410.13828).

    Returns:
      One loss per pair, [pairs], not reduced. Of equal lengths it is DPO's.

    Slopes:
      d_w / d_l = 1

    References:
      Park et al., 2024, arXiv:2403.19159.
    """
    positive(beta=beta)
    non_negative(alpha=alpha)
    longer = pairs.chosen_tokens - pairs.rejected_tokens
    return -jax.nn.log_sigmoid(beta * pairs.margin + alpha * longer)
