"""Direct preference optimisation and its versions for flipped labels."""

import jax
from jaxtyping import Array, Float

from jaxalign.losses.checks import Strength, flip_probability, positive
from jaxalign.losses.pairs import PairLogProbs


def dpo(
    pairs: PairLogProbs, *, beta: Strength = 0.1, label_smoothing: float = 0.0
) -> Float[Array, " pairs"]:
    r"""Logistic loss on the margin between the implicit rewards of chosen and rejected.

    .. math:: \ell = -(1-\epsilon) \log\sigma(\beta h) - \epsilon \log\sigma(-\beta h), \quad
              h = (\log\pi_w - \log\pi^{ref}_w) - (\log\pi_l - \log\pi^{ref}_l)

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: inverse temperature of the implicit reward, > 0. Default 0.1: the paper's.
      label_smoothing: probability epsilon that a label is flipped, in [0, 0.5). Default 0: the
        paper's loss; above 0 it is conservative DPO.

    Returns:
      One loss per pair, [pairs], not reduced. At policy = reference it is log 2.

    Slopes:
      d_w / d_l = 1

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxalign.losses import PairLogProbs, dpo
      >>> logps, length = jnp.array([-5.0]), jnp.array([3])
      >>> pairs = PairLogProbs(
      ...     chosen=logps + 2.0, rejected=logps, reference_chosen=logps,
      ...     reference_rejected=logps, chosen_length=length, rejected_length=length)
      >>> print(f"{dpo(pairs, beta=0.5)[0]:.4f}")  # log(1 + exp(-0.5 * 2))
      0.3133

    References:
      Rafailov et al., 2023, arXiv:2305.18290, eq. 7. Label smoothing: Mitchell, 2023, "A note on
      DPO with noisy preferences and relationship to IPO".
    """
    positive(beta=beta)
    flip_probability(label_smoothing=label_smoothing)
    agree = jax.nn.log_sigmoid(beta * pairs.margin)
    flipped = jax.nn.log_sigmoid(-beta * pairs.margin)
    return -(1 - label_smoothing) * agree - label_smoothing * flipped


def robust_dpo(
    pairs: PairLogProbs, *, beta: float = 0.01, label_smoothing: float = 0.1
) -> Float[Array, " pairs"]:
    r"""Unbiased estimate of the DPO loss under labels flipped with a known probability.

    .. math:: \ell = \frac{-(1-\epsilon) \log\sigma(\beta h) + \epsilon \log\sigma(-\beta h)}
                          {1 - 2\epsilon}, \quad
              h = (\log\pi_w - \log\pi^{ref}_w) - (\log\pi_l - \log\pi^{ref}_l)

    Averaged over the flips, it is DPO's loss on the true label; it may be negative.

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: inverse temperature of the implicit reward, > 0. Default 0.01: the paper's.
      label_smoothing: probability epsilon that a label is flipped, in [0, 0.5): a property of
        the data. Default 0.1: the paper's. At 0 the loss is DPO's.

    Returns:
      One loss per pair, [pairs], not reduced. At policy = reference it is log 2.

    Slopes:
      d_w / d_l = 1

    References:
      Chowdhury et al., 2024, arXiv:2403.00409.
    """
    positive(beta=beta)
    flip_probability(label_smoothing=label_smoothing)
    agree = jax.nn.log_sigmoid(beta * pairs.margin)
    flipped = jax.nn.log_sigmoid(-beta * pairs.margin)
    return (label_smoothing * flipped - (1 - label_smoothing) * agree) / (1 - 2 * label_smoothing)
