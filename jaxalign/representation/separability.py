"""Separability of preferred and dispreferred states: principal components and a linear probe."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

from jaxalign.evaluation.logistic import fit_logistic


@dataclass(frozen=True, kw_only=True)
class Components:
    """The directions of largest variance."""

    centre: Float64[np.ndarray, " width"]
    axes: Float64[np.ndarray, "components width"]
    """Orthonormal; the first has the largest variance."""
    explained: Float64[np.ndarray, " components"]
    """Fraction of the variance along each axis."""

    def __call__(self, states: Float64[np.ndarray, "n width"]) -> Float64[np.ndarray, "n c"]:
        """Coordinates of states along the axes."""
        return (states - self.centre) @ self.axes.T


def principal_components(states: Float64[np.ndarray, "n width"], number: int = 2) -> Components:
    r"""Principal components of hidden states.

    .. math:: X - \bar X = U \Sigma V^\top, \quad \text{axes: the first rows of } V^\top

    Args:
      states: [n, width].
      number: of components.
    """
    centre = states.mean(0)
    _, sizes, axes = np.linalg.svd(states - centre, full_matrices=False)
    power = np.square(sizes)
    total = power.sum()
    fractions = power / total if total > 0 else np.zeros_like(power)
    return Components(centre=centre, axes=axes[:number], explained=fractions[:number])


def probe_accuracy(
    positive: Float64[np.ndarray, "pairs width"],
    negative: Float64[np.ndarray, "pairs width"],
    fitted: Bool[np.ndarray, " pairs"],
    *,
    ridge: float = 1.0,
) -> float:
    """Held-out accuracy of a linear probe of preferred and dispreferred states.

    Features are standardised on the fitted pairs; the probe has an intercept.

    Args:
      positive: states of preferred stimuli, [pairs, width].
      negative: of the dispreferred ones.
      fitted: pairs for fitting; the others are held out.
      ridge: penalty on its coefficients.

    Returns:
      Fraction of the held-out states of both sides that are classified correctly; 1/2 is chance.
    """
    states = np.concatenate([positive[fitted], negative[fitted]])
    mean, deviation = states.mean(0), states.std(0)
    scale = np.where(deviation > 0, deviation, 1.0)

    def design(states: np.ndarray) -> np.ndarray:
        return np.column_stack([(states - mean) / scale, np.ones(len(states))])

    label = np.repeat([1.0, 0.0], fitted.sum())
    weights = fit_logistic(design(states), label, ridge=ridge)
    sides = design(positive[~fitted]) @ weights, design(negative[~fitted]) @ -weights
    scores = np.concatenate(sides)
    return float(np.mean((scores > 0) + 0.5 * (scores == 0)))


def separability(
    positive: Float64[np.ndarray, "pairs layers width"],
    negative: Float64[np.ndarray, "pairs layers width"],
    fitted: Bool[np.ndarray, " pairs"],
) -> Sequence[float]:
    """`probe_accuracy` of each layer."""
    return [
        probe_accuracy(positive[:, at], negative[:, at], fitted) for at in range(positive.shape[1])
    ]
