"""Logistic regression on soft labels, in float64, for a few coefficients or a few hundred."""

import numpy as np
from jaxtyping import Float, Float64

STEPS = 100
TOLERANCE = 1e-12


def fit_logistic(
    design: Float[np.ndarray, "rows coefficients"],
    target: Float[np.ndarray, " rows"],
    *,
    weight: Float[np.ndarray, " rows"] | None = None,
    offset: Float[np.ndarray, " rows"] | float = 0.0,
    ridge: Float[np.ndarray, " coefficients"] | float = 0.0,
) -> Float64[np.ndarray, " coefficients"]:
    r"""Coefficients w that minimise the weighted cross-entropy and a ridge, by Newton's method.

    .. math:: \sum_i c_i \left[\log(1 + e^{z_i}) - t_i z_i\right]
              + \tfrac12 \sum_j \lambda_j w_j^2, \qquad z_i = o_i + x_i^\top w

    Args:
      design: the rows x_i.
      target: t_i in [0, 1].
      weight: c_i, not negative; None is 1.
      offset: o_i, which is not fitted.
      ridge: lambda, for all coefficients or each; directions in which nothing is known (a column
        of zeros) and separable data need one above 0.

    Returns:
      The minimiser. Of directions without curvature, the solution that stays at 0.
    """
    weight = np.ones(len(target)) if weight is None else weight
    penalty = np.broadcast_to(np.asarray(ridge, np.float64), design.shape[1:])
    w = np.zeros(design.shape[1])

    def objective(w: np.ndarray) -> float:
        z = offset + design @ w
        return float(weight @ (np.logaddexp(0, z) - target * z) + penalty @ w**2 / 2)

    value = objective(w)
    for _ in range(STEPS):
        p = 0.5 + 0.5 * np.tanh((offset + design @ w) / 2)
        slope = design.T @ (weight * (p - target)) + penalty * w
        curvature = (design.T * (weight * p * (1 - p))) @ design + np.diag(penalty)
        step = np.linalg.lstsq(curvature, slope, rcond=None)[0]
        size = 1.0
        while (new := objective(w - size * step)) > value and size > 1e-10:
            size /= 2
        w, gain, value = w - size * step, value - new, new
        if gain <= TOLERANCE * max(1.0, abs(value)):
            break
    return w
