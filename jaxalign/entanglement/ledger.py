r"""The ledger: the change of a log-prob in one update, split by where it came from.

An update moves the parameters by :math:`\Delta`, whatever the optimiser. With g the gradient of the
log-prob of one response, D the negative gradient of the batch's loss (both before the update) and
:math:`a = \langle \Delta, D \rangle / \|D\|^2`, the length of the update along D:

.. math:: \log\pi_{\theta + \Delta} - \log\pi_\theta
          = \underbrace{a \frac{w_i}{W} \langle g, d_w g_w - d_l g_l \rangle}_{\text{own}}
          + \underbrace{a \langle g, D \rangle - \text{own}}_{\text{others}}
          + \underbrace{\langle g, \Delta - a D \rangle}_{\text{optimiser}}
          + \text{curvature}

*own*: the pair's own two gradients; *others*: the other pairs of the batch; *optimiser*: momentum,
preconditioning, decay and the rounding of the parameters; *curvature*: what first order misses.
Sums over updates are sums of parts. A response outside the batch has no *own* part.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.entanglement.coefficients import Coefficients
from jaxalign.entanglement.conditions import PairGeometry
from jaxalign.models.differentiation import forward_mode
from jaxalign.records import AnyArray, record

Tree = Any
"""Arrays of the trained parameters' shapes."""

PARTS = ("own", "others", "optimiser", "curvature")
"""In the order in which they are shown."""


@record
class TokenChanges:
    """Changes of the log-probs of response tokens in one update, in nats; 0 at padding.

    Attributes:
      gradient: to first order, of the update's part along the batch's gradient (own and others).
      optimiser: to first order, of the rest of the update.
      curvature: what remains.
    """

    gradient: Float[AnyArray, "pairs 2 response"]
    optimiser: Float[AnyArray, "pairs 2 response"]
    curvature: Float[AnyArray, "pairs 2 response"]

    @property
    def realised(self) -> Float[AnyArray, "pairs 2 response"]:
        """The whole changes."""
        return self.gradient + self.optimiser + self.curvature


@record
class Changes:
    """Changes of the log-probs of chosen and rejected in one update, in nats.

    Attributes:
      own: from the pair's own two gradients; NaN where these are not known.
      others: from the gradients of the other pairs of the batch.
      optimiser: from momentum, preconditioning, decay and rounding.
      curvature: what first order misses.
    """

    own: Float[AnyArray, "pairs 2"]
    others: Float[AnyArray, "pairs 2"]
    optimiser: Float[AnyArray, "pairs 2"]
    curvature: Float[AnyArray, "pairs 2"]

    @property
    def realised(self) -> Float[AnyArray, "pairs 2"]:
        """The whole changes."""
        return self.own + self.others + self.optimiser + self.curvature


def rate_along(update: Tree, gradient: Tree) -> Float[Array, ""]:
    r"""The length of an update along the descent direction D, in units of D.

    .. math:: a = \langle \Delta, D \rangle / \|D\|^2

    For plain gradient descent it is the learning rate, times the factor of gradient clipping.

    Args:
      update: the difference of the parameters.
      gradient: of the batch's loss, -D.

    Returns:
      a, summed in float32; 0 if the gradient is zero.
    """

    def inner(u: Tree, v: Tree) -> Float[Array, ""]:
        products = jax.tree.map(lambda x, y: jnp.sum(_float32(x) * _float32(y)), u, v)
        return jnp.sum(jnp.stack(jax.tree.leaves(products)))

    square = inner(gradient, gradient)
    return jnp.where(square > 0, -inner(update, gradient) / jnp.where(square > 0, square, 1), 0.0)


def token_changes(
    log_probs: Callable[[Tree], Float[Array, "pairs 2 response"]],
    before: Tree,
    after: Tree,
    gradient: Tree,
    rate: Float[Array, ""],
) -> TokenChanges:
    """Split the changes of all tokens: one forward-mode pass in two directions, one forward pass.

    Args:
      log_probs: trained parameters -> log-probs of the response tokens.
      before: parameters before the update.
      after: parameters after the update.
      gradient: of the batch's loss at `before`.
      rate: `rate_along` of the update.
    """

    def directions(old: Array, new: Array, slope: Array) -> Array:
        along = -rate * _float32(slope)
        return jnp.stack([along, _float32(new) - _float32(old) - along]).astype(old.dtype)

    with forward_mode():
        start, derivatives = jax.vmap(
            lambda tangent: jax.jvp(log_probs, (before,), (tangent,)), out_axes=(None, 0)
        )(jax.tree.map(directions, before, after, gradient))
        realised = log_probs(after) - start
    return TokenChanges(
        gradient=derivatives[0],
        optimiser=derivatives[1],
        curvature=realised - derivatives[0] - derivatives[1],
    )


def own_changes(
    geometry: PairGeometry,
    weights: Coefficients,
    fraction: Float[Array, " pairs"],
    rate: Float[Array, ""],
    *,
    smallest: float = 0.0,
) -> Float[Array, "pairs 2"]:
    """The part of a pair's own two gradients in its first-order changes.

    Args:
      geometry: of the pairs; NaN where a coefficient is too small to divide by.
      weights: the coefficients d_w and d_l with which the update was made.
      fraction: w_i / W, the weight of each pair in the mean loss.
      rate: `rate_along` of the update.
      smallest: contributions with |fraction * coefficient| below it count as zero.

    Returns:
      Changes of chosen and rejected; NaN where a number that is needed is NaN.
    """

    def times(weight: Array, product: Array) -> Array:
        factor = rate * fraction * weight
        return jnp.where(jnp.abs(fraction * weight) <= smallest, 0.0, factor * product)

    chosen = times(weights.chosen, geometry.chosen) - times(weights.rejected, geometry.inner)
    rejected = times(weights.chosen, geometry.inner) - times(weights.rejected, geometry.rejected)
    return jnp.stack([chosen, rejected], axis=1)


def changes(tokens: TokenChanges, own: Float[Array, "pairs 2"] | None = None) -> Changes:
    """The split of whole responses.

    Args:
      tokens: of their tokens.
      own: from `own_changes`; None: the pairs are not in the batch.
    """
    along = tokens.gradient.sum(-1)
    own = jnp.zeros_like(along) if own is None else own
    return Changes(
        own=own,
        others=along - own,
        optimiser=tokens.optimiser.sum(-1),
        curvature=tokens.curvature.sum(-1),
    )


def _float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
