"""Losses of reward models and of pairwise preference models."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.losses.checks import non_negative


def bradley_terry(
    chosen_reward: Float[Array, " pairs"],
    rejected_reward: Float[Array, " pairs"],
    *,
    margin: float | Float[Array, " pairs"] = 0.0,
    centering: float = 0.0,
) -> Float[Array, " pairs"]:
    r"""Negative log-likelihood of the preference under Bradley and Terry's model of rewards.

    .. math:: \ell = -\log\sigma(R_w - R_l - m) + c (R_w + R_l)^2

    Args:
      chosen_reward: scalar reward R_w of the chosen response, [pairs].
      rejected_reward: scalar reward R_l of the rejected response, [pairs].
      margin: margin m by which chosen should lead, one per pair, [pairs], or one for all; larger
        where annotators were more certain. Default 0: none.
      centering: weight c of the penalty that keeps rewards around zero, which the likelihood
        leaves free, >= 0. Default 0: none; 0.01 is usual.

    Returns:
      One loss per pair, [pairs], not reduced. At equal rewards without margin it is log 2.

    Slopes:
      d_w / d_l = 1 without centering

    References:
      Ouyang et al., 2022, arXiv:2203.02155. Margin: Touvron et al., 2023 (Llama 2),
      arXiv:2307.09288. Centering: Eisenstein et al., 2023, arXiv:2312.09244.
    """
    non_negative(centering=centering)
    likelihood = -jax.nn.log_sigmoid(chosen_reward - rejected_reward - margin)
    return likelihood + centering * jnp.square(chosen_reward + rejected_reward)


def preference_model(
    logits: Float[Array, " pairs"], preferences: Float[Array, " pairs"]
) -> Float[Array, " pairs"]:
    r"""Cross-entropy between a pairwise model's preference and a label that may be soft.

    .. math:: \ell = -p \log\sigma(z) - (1 - p) \log\sigma(-z)

    Args:
      logits: log-odds z that the first response is preferred to the second, [pairs].
      preferences: probability p that it is, in [0, 1], [pairs]; 1 or 0 for a hard label, the
        fraction of votes otherwise.

    Returns:
      One loss per pair, [pairs], not reduced. At z = 0 it is log 2 for any label; its
      minimum over z is the entropy of the label.

    Slopes:
      d loss / d z = sigma(z) - p

    References:
      Munos et al., 2023, arXiv:2312.00886, section on the preference model.
    """
    agree, flipped = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -preferences * agree - (1 - preferences) * flipped
