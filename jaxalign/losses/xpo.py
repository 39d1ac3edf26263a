"""Exploratory preference optimisation: online DPO with optimism."""

from jaxtyping import Array, Float

from jaxalign.losses.checks import non_negative
from jaxalign.losses.dpo import dpo
from jaxalign.losses.pairs import PairLogProbs
from jaxalign.losses.soft_labels import soft_label


def xpo(
    pairs: PairLogProbs,
    preference: Float[Array, " pairs"],
    *,
    beta: float = 0.1,
    alpha: float = 1e-5,
) -> Float[Array, " pairs"]:
    r"""Online DPO that also lowers the likelihood of the reference's responses.

    .. math:: \ell = -p \log\sigma(\beta h) - (1 - p) \log\sigma(-\beta h) + \alpha \log\pi(y'),
              \quad h = (\log\pi_y - \log\pi^{ref}_y) - (\log\pi_{y'} - \log\pi^{ref}_{y'})

    Args:
      pairs: log-probabilities summed over response tokens, in nats; `chosen` is a response y of
        the policy, `rejected` one of the reference, y', whichever is preferred; every field is
        [pairs].
      preference: probability p that the policy's response is preferred, in [0, 1], [pairs].
      beta: inverse temperature of the implicit reward, > 0. Default 0.1: TRL's.
      alpha: weight of the optimism, >= 0. Default 1e-5: TRL's; at 0 the loss is online DPO's.

    Returns:
      One loss per pair, [pairs], not reduced.

    Slopes:
      d_w / d_l = 1 - alpha / d_l

    References:
      Xie et al., 2024, arXiv:2405.21046.
    """
    non_negative(alpha=alpha)
    return soft_label(dpo, pairs, preference, beta=beta) + alpha * pairs.rejected
