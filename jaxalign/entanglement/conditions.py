"""Conditions under which a step raises the chosen log-prob and lowers the rejected one."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign.entanglement.coefficients import Coefficients
from jaxalign.records import record

CASES = ("undefined", "ideal", "both down", "both up", "reversed")
"""Names of what `case` returns. The reversed case needs a negative coefficient (IPO past its
target)."""


@record
class PairGeometry:
    """The Gram matrix of a pair's two log-prob gradients over the trained parameters.

    Attributes:
      chosen: n_w, squared norm of the gradient of the chosen response's log-prob.
      rejected: n_l, squared norm of the rejected one's.
      inner: their inner product.
    """

    chosen: Float[Array, "pairs ..."]
    rejected: Float[Array, "pairs ..."]
    inner: Float[Array, "pairs ..."]


def cosine(geometry: PairGeometry) -> Float[Array, "pairs ..."]:
    r"""Cosine of the two gradients, :math:`\rho = \langle g_w, g_l \rangle / \sqrt{n_w n_l}`."""
    return geometry.inner / (jnp.sqrt(geometry.chosen) * jnp.sqrt(geometry.rejected))


def norm_ratio(geometry: PairGeometry) -> Float[Array, " pairs"]:
    r"""Norm of the rejected gradient over that of the chosen one, :math:`r^* = \|g_l\|/\|g_w\|`."""
    return jnp.sqrt(geometry.rejected) / jnp.sqrt(geometry.chosen)


def band(geometry: PairGeometry) -> tuple[Float[Array, " pairs"], Float[Array, " pairs"]]:
    r"""The ratios d_w / d_l at which a step raises chosen and lowers rejected.

    .. math:: \rho \, r^* < \frac{d_w}{d_l} < \frac{r^*}{\rho} \quad (\rho > 0), \qquad
              0 < \frac{d_w}{d_l} < \infty \quad (\rho \le 0)

    The band is empty only at a cosine of 1; its centre on a logarithmic scale is r*.

    Args:
      geometry: the pairs' Gram matrices.

    Returns:
      Lower and upper end, [pairs]; infinity if there is no upper end.
    """
    rho, centre = cosine(geometry), norm_ratio(geometry)
    tangled = rho > 0
    upper = jnp.where(tangled, centre / jnp.where(tangled, rho, 1.0), jnp.inf)
    return jnp.where(tangled, rho * centre, 0.0), jnp.where(jnp.isnan(rho), jnp.nan, upper)


def first_order_changes(
    geometry: PairGeometry,
    weights: Coefficients,
    *,
    learning_rate: float | Float[Array, ""] = 1.0,
) -> tuple[Float[Array, " pairs"], Float[Array, " pairs"]]:
    r"""First-order changes of a pair's log-probs by a gradient step on the pair alone.

    .. math:: \Delta\log\pi_w = \eta (d_w n_w - d_l \langle g_w, g_l \rangle), \quad
              \Delta\log\pi_l = \eta (d_w \langle g_w, g_l \rangle - d_l n_l)

    Args:
      geometry: the pairs' Gram matrices.
      weights: the loss's coefficients.
      learning_rate: eta.

    Returns:
      Changes of the chosen and of the rejected log-prob in nats, [pairs]. Yuan et al., 2024,
      arXiv:2410.13828, equations 4 and 5 for DPO.
    """
    chosen = weights.chosen * geometry.chosen - weights.rejected * geometry.inner
    rejected = weights.chosen * geometry.inner - weights.rejected * geometry.rejected
    return learning_rate * chosen, learning_rate * rejected


def case_of_changes(
    chosen: Float[Array, " pairs"], rejected: Float[Array, " pairs"]
) -> Int[Array, " pairs"]:
    """The case of two changes by their signs; a change of 0 counts as in the ideal case."""
    up, down = chosen >= 0, rejected <= 0
    return jnp.where(up, jnp.where(down, 1, 3), jnp.where(down, 2, 4))


def case(geometry: PairGeometry, weights: Coefficients) -> Int[Array, " pairs"]:
    """The case of a pair, by the signs of its first-order changes.

    With both coefficients positive: "ideal" (chosen up, rejected down), "both down" where the
    inner product exceeds (d_w / d_l) n_w, "both up" where it exceeds (d_l / d_w) n_l; both at
    once is impossible. A pair is "undefined" if neither changes (a hinge at rest) or a value is not
    a number.

    Args:
      geometry: the pairs' Gram matrices.
      weights: the loss's coefficients.

    Returns:
      Indices of `CASES`, [pairs]. Yuan et al., 2024, arXiv:2410.13828, table 1.
    """
    chosen, rejected = first_order_changes(geometry, weights)
    number = case_of_changes(chosen, rejected)
    still = (weights.chosen == 0) & (weights.rejected == 0)
    return jnp.where(still | jnp.isnan(chosen) | jnp.isnan(rejected), 0, number)
