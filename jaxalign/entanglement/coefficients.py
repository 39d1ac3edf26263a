"""Coefficients d_w and d_l of any loss on the gradients of chosen and rejected log-probs."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxalign.losses import PairLogProbs, PreferenceLoss
from jaxalign.records import record


@record
class Coefficients:
    """The weights of a pair's two gradients in the descent direction of its loss.

    Attributes:
      chosen: d_w = -d loss / d log pi_w, per pair.
      rejected: d_l = d loss / d log pi_l, per pair.
    """

    chosen: Float[Array, " pairs"]
    rejected: Float[Array, " pairs"]

    @property
    def ratio(self) -> Float[Array, " pairs"]:
        """d_w / d_l; infinite if the loss does not depend on the rejected response."""
        return self.chosen / self.rejected


def coefficients(loss: PreferenceLoss, pairs: PairLogProbs, **options: Any) -> Coefficients:
    r"""Coefficients of a loss by differentiating the loss function itself.

    .. math:: -\nabla_\theta \ell = d_w \nabla_\theta \log\pi_w - d_l \nabla_\theta \log\pi_l,
              \quad d_w = -\frac{\partial\ell}{\partial\log\pi_w}, \quad
              d_l = \frac{\partial\ell}{\partial\log\pi_l}

    A batch-coupled loss is differentiated as in training: batch statistics under `stop_gradient`
    are constants, and any other dependence of a pair's loss on another pair adds to that other
    pair's coefficients.

    Args:
      loss: from `PREFERENCE_LOSSES`, or any function from `PairLogProbs` to a value per pair.
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      **options: hyperparameters of the loss.

    Returns:
      d_w and d_l, [pairs].

    References:
      Yuan et al., 2024, arXiv:2410.13828, section 3.2.
    """

    def total(chosen: Array, rejected: Array) -> Array:
        return loss(dataclasses.replace(pairs, chosen=chosen, rejected=rejected), **options).sum()

    chosen, rejected = jax.grad(total, argnums=(0, 1))(pairs.chosen, pairs.rejected)
    return Coefficients(chosen=-chosen, rejected=rejected)
