"""Stable alignment's contrastive loss: rated responses to one prompt, the best one imitated."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def stable_alignment(
    nll: Float[Array, "prompts responses"],
    rating: Float[Array, "prompts responses"],
    *,
    margin: float = 10.0,
    ratio: float = 0.2,
    scale: float = 7.0,
) -> Float[Array, " prompts"]:
    r"""The best response's loss, and a hinge on how much less likely the others should be.

    .. math:: L_b + \lambda \max\left(0, \frac{1}{n - 1} \sum_{i \neq b}
        \left(L_b - L_i + \frac{s_b - s_i}{S} M\right)\right), \qquad b = \arg\max_i s_i

    The margin goes with each response's own rating (the released code, which reads sorted ratings
    by unsorted places, gives it to another one).

    Args:
      nll: L, mean negative log-prob of each response's tokens, in nats.
      rating: s, of each response; of equal best ones the first is imitated.
      margin: M; the released settings' 10.
      ratio: lambda; 0.2.
      scale: S, of the ratings; 7.

    Returns:
      One value for each prompt.

    References:
      Liu et al., 2023, arXiv:2305.16960, section 3.3; released settings of Stable-Alignment.
    """
    others = nll.shape[1] - 1
    best = jnp.argmax(rating, axis=1, keepdims=True)
    of_best = jnp.take_along_axis(nll, best, axis=1)
    gap = jnp.take_along_axis(rating, best, axis=1) - rating
    terms = of_best - nll + gap / scale * margin  # 0 for the best one itself
    return of_best[:, 0] + ratio * jnp.maximum(0.0, terms.sum(1) / others)
