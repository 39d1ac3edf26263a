"""Reweighting of a pair's two gradients, so that chosen rises and rejected falls.

A reweighting replaces the coefficients that the loss gives the two gradients of a pair, given these
coefficients and the pair's geometry. The value of the loss does not change.
"""

from collections.abc import Callable

import jax.numpy as jnp

from jaxalign.entanglement.coefficients import Coefficients
from jaxalign.entanglement.conditions import PairGeometry, norm_ratio

Reweighting = Callable[[Coefficients, PairGeometry], Coefficients]


def normalised(weights: Coefficients, geometry: PairGeometry) -> Coefficients:
    r"""Pairwise normalised gradients: unit vectors instead of the two gradients.

    .. math:: d_w' = d_w / \|g_w\|, \quad d_l' = d_l / \|g_l\|

    With d_w = d_l the chosen log-prob rises and the rejected one falls whenever the cosine is below
    1, by :math:`d \|g\| (1 - \rho)` to first order. Steps have the size of coefficients rather than
    of gradients, so the learning rate must be tuned again.

    Args:
      weights: the loss's coefficients.
      geometry: the pairs' Gram matrices.

    Returns:
      The coefficients to use; a gradient that is zero keeps its own.

    References:
      Yuan et al., 2024, arXiv:2410.13828, section 5.1.
    """

    def unit(weight, squared_norm):
        return weight / jnp.where(squared_norm > 0, jnp.sqrt(squared_norm), 1.0)

    return Coefficients(
        chosen=unit(weights.chosen, geometry.chosen),
        rejected=unit(weights.rejected, geometry.rejected),
    )


def centred(weights: Coefficients, geometry: PairGeometry) -> Coefficients:
    r"""Coefficients moved to the centre of the disentanglement band, their product kept.

    .. math:: d_w' = k d_w, \quad d_l' = d_l / k, \quad
              k = \sqrt{r^* d_l / d_w}, \quad r^* = \|g_l\| / \|g_w\|

    This equals replacing a log-prob a by :math:`\tilde a = k a + (1 - k) \, \mathrm{sg}(a)`, which
    keeps its forward value.

    Args:
      weights: the loss's coefficients.
      geometry: the pairs' Gram matrices.

    Returns:
      The coefficients to use; a pair whose k is not a positive number (a resting hinge, a zero
      gradient, coefficients of different signs) keeps its own.

    References:
      The band: arXiv:2604.18239; its centre is where arXiv:2410.13828, section 5.1, leads.
    """
    square = norm_ratio(geometry) * weights.rejected / weights.chosen
    defined = jnp.isfinite(square) & (square > 0)
    k = jnp.sqrt(jnp.where(defined, square, 1.0))
    return Coefficients(chosen=weights.chosen * k, rejected=weights.rejected / k)


REWEIGHTINGS: dict[str, Reweighting] = {"normalised": normalised, "centred": centred}
"""`entanglement.reweighting` -> its function."""
