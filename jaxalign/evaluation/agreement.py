"""How far a judge agrees with people."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from jaxalign.evaluation.win_rates import wilson


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A judge beside labels."""

    accuracy: float
    """Share of the labelled winners that it found; its ties count half. Labelled ties are left
    out."""
    interval: tuple[float, float]
    """Wilson's, of the accuracy."""
    kappa: float
    """Cohen's, over first, tie and second; 0 is chance."""
    ties: int
    """Of the judge."""
    number: int
    """Comparisons with verdict and label."""
    failures: int
    """Without a verdict."""


def agreement(
    preference: Float64[np.ndarray, " n"],
    label: Float64[np.ndarray, " n"],
    *,
    confidence: float = 0.95,
) -> Agreement:
    """Accuracy and Cohen's kappa of verdicts against labels.

    Every comparison counts for kappa in both orders, so that it does not matter which response a
    file puts first: where the better one always comes first, the plain kappa would be 0.

    Args:
      preference: P(first is better), NaN where there is no verdict.
      label: 1 where people prefer the first, 0 the second, 0.5 neither.
      confidence: of the interval.
    """
    known = np.isfinite(preference)
    said, true = np.sign(preference[known] - 0.5), np.sign(label[known] - 0.5)
    decided = true != 0
    right = np.where(said == true, 1.0, np.where(said == 0, 0.5, 0.0))[decided]
    accuracy = float(right.mean()) if len(right) else float("nan")
    return Agreement(
        accuracy=accuracy,
        interval=wilson(accuracy, len(right), confidence=confidence),
        kappa=cohens_kappa(np.concatenate([said, -said]), np.concatenate([true, -true])),
        ties=int((said == 0).sum()),
        number=int(known.sum()),
        failures=int((~known).sum()),
    )


def cohens_kappa(a: Float64[np.ndarray, " n"], b: Float64[np.ndarray, " n"]) -> float:
    r"""Agreement of two raters beyond chance.

    .. math:: \kappa = \frac{p_o - p_e}{1 - p_e}

    with the share of equal ratings p_o, and p_e what the raters' own frequencies give by chance.

    Args:
      a: one rater's classes, as numbers.
      b: the other's.

    References:
      Cohen 1960, "A coefficient of agreement for nominal scales".
    """
    if not len(a):
        return float("nan")
    observed = float((a == b).mean())
    chance = sum(float((a == x).mean() * (b == x).mean()) for x in np.unique(a))
    return (observed - chance) / (1 - chance) if chance < 1 else float("nan")
