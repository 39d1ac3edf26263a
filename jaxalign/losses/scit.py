"""Single LLM contrastive instruction tuning: one response under two opposite instructions."""

import jax
from jaxtyping import Array, Float

from jaxalign.losses.checks import flip_probability
from jaxalign.losses.pairs import PairLogProbs


def scit(pairs: PairLogProbs) -> Float[Array, " pairs"]:
    r"""Supervised loss plus a two-way choice of the instruction that the response follows.

    .. math:: \ell = -\log\pi_w - \log\frac{\pi_w}{\pi_w + \pi_l}, \quad
              \log\pi_w = \log\pi(y \mid p, x), \quad \log\pi_l = \log\pi(y \mid \tilde p, x)

    Both rows of a pair are the same response: under the instruction that it agrees with (chosen)
    and under the opposite one (rejected).

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].

    Returns:
      One loss per pair, [pairs], not reduced. Where the model ignores the instruction it is
      -log pi_w + log 2.

    Slopes:
      d_w / d_l = 2 + pi_w / pi_l

    References:
      Liu et al., 2024, arXiv:2312.15997 (RAHF-SCIT).
    """
    return -pairs.chosen - jax.nn.log_sigmoid(pairs.chosen - pairs.rejected)


def scit_mean(pairs: PairLogProbs, *, label_smoothing: float = 0.2) -> Float[Array, " pairs"]:
    r"""The same on mean log-probs of a token, the choice with label smoothing.

    .. math:: \ell = -\bar a_w - (1-\epsilon) \log\sigma(\bar a_w - \bar a_l)
              - \epsilon \log\sigma(\bar a_l - \bar a_w), \quad \bar a = \frac{\log\pi}{L}

    Args:
      pairs: as for `scit`; every field is [pairs].
      label_smoothing: epsilon in [0, 1/2). Default 0.2: that of the authors' code, which took it
        over from hindsight instruction relabelling.

    Returns:
      One loss per pair, [pairs], not reduced. At equal means it is -a_w / L_w + log 2.

    Slopes:
      d_w / d_l = (1 + 1 / (sigma(m_l - m_w) - epsilon)) L_l / L_w, with the means m = log pi / L

    References:
      Liu et al., 2024, arXiv:2312.15997 (the form of its code); Zhang et al., 2023,
      arXiv:2302.05206, on HIR, where it comes from.
    """
    flip_probability(label_smoothing=label_smoothing)
    gap = pairs.chosen_mean - pairs.rejected_mean
    agrees = (1 - label_smoothing) * jax.nn.log_sigmoid(gap)
    return -pairs.chosen_mean - agrees - label_smoothing * jax.nn.log_sigmoid(-gap)
