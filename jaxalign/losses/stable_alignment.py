"""Stable Alignment's contrastive loss: the best-rated response imitated, the others held below."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.losses.checks import non_negative, positive
from jaxalign.losses.pairs import PairLogProbs


def stable_alignment(
    pairs: PairLogProbs,
    *,
    gap: float | Float[Array, " pairs"] = 1.0,
    margin: float = 10.0,
    ratio: float = 0.2,
    scale: float = 7.0,
) -> Float[Array, " pairs"]:
    r"""Imitation of chosen, and a hinge whose margin is the gap between the two ratings.

    .. math:: \ell = \lambda_w + \rho \max\Bigl(0, \lambda_w - \lambda_l + \frac{g}{S} M\Bigr),
              \quad \lambda = -\frac{\log\pi}{L}

    Two responses of `stable_alignment_rated`.

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      gap: g, rating of chosen less rating of rejected, >= 0: one per pair, [pairs], or one for all.
        Default 1, the smallest gap of whole ratings, for data without them.
      margin: M, in nats per token, >= 0. Default 10: the released settings'.
      ratio: rho, weight of the hinge, >= 0. Default 0.2: the released settings'.
      scale: S, of the ratings, > 0. Default 7: theirs go from 1 to 7.

    Returns:
      One loss per pair, [pairs], not reduced. Without the hinge it is SFT's, by tokens.

    Slopes:
      d_w / d_l = (1 + 1 / rho) L_l / L_w while the hinge is active; infinite otherwise (d_l = 0)

    References:
      Liu et al., 2023, arXiv:2305.16960, section 3.3.
    """
    non_negative(margin=margin, ratio=ratio)
    positive(scale=scale)
    lead = pairs.rejected_mean - pairs.chosen_mean + jnp.asarray(gap) / scale * margin
    return -pairs.chosen_mean + ratio * jax.nn.relu(lead)


def stable_alignment_rated(
    nll: Float[Array, "prompts responses"],
    rating: Float[Array, "prompts responses"],
    *,
    margin: float = 10.0,
    ratio: float = 0.2,
    scale: float = 7.0,
) -> Float[Array, " prompts"]:
    r"""Imitation of the best of several rated responses, and a hinge on the others' mean lead.

    .. math:: \ell = \lambda_b + \rho \max\Bigl(0, \frac{1}{n - 1} \sum_{i \neq b}
        \bigl(\lambda_b - \lambda_i + \frac{s_b - s_i}{S} M\bigr)\Bigr), \quad
        b = \arg\max_i s_i

    The margin of a response uses its own rating (the released code indexes sorted ratings with
    unsorted positions, and so uses another response's).

    Args:
      nll: lambda, mean negative log-prob of each response's tokens, in nats.
      rating: s, of each response; the first of equal best ones is imitated.
      margin: M, in nats per token, >= 0; the released settings' 10.
      ratio: rho, >= 0; theirs, 0.2.
      scale: S, of the ratings, > 0; 7.

    Returns:
      One value for each prompt, [prompts], not reduced.

    References:
      Liu et al., 2023, arXiv:2305.16960, section 3.3; released settings of Stable-Alignment.
    """
    non_negative(margin=margin, ratio=ratio)
    positive(scale=scale)
    others = nll.shape[1] - 1
    best = jnp.argmax(rating, axis=1, keepdims=True)
    of_best = jnp.take_along_axis(nll, best, axis=1)
    gap = jnp.take_along_axis(rating, best, axis=1) - rating
    terms = of_best - nll + gap / scale * margin  # 0 for the best one itself
    return of_best[:, 0] + ratio * jax.nn.relu(terms.sum(1) / others)
