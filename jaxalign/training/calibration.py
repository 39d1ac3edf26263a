"""Whether a preference model's probabilities are frequencies: reliability and its error."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Pairs in equal bins of [1/2, 1], by the probability of the predicted winner.

    Attributes:
      count: number of pairs in each bin.
      confidence: mean probability of the predicted winner; NaN in an empty bin.
      accuracy: fraction of pairs whose predicted winner is right; NaN in an empty bin.
    """

    count: Int[np.ndarray, " bins"]
    confidence: Float[np.ndarray, " bins"]
    accuracy: Float[np.ndarray, " bins"]

    @property
    def error(self) -> float:
        r"""The expected calibration error.

        .. math:: \text{ECE} = \sum_b \frac{n_b}{n} |\text{accuracy}_b - \text{confidence}_b|

        Guo et al., 2017, arXiv:1706.04599, equation 3.
        """
        filled = self.count > 0
        gaps = np.abs(self.accuracy - self.confidence)[filled]
        return float(np.sum(self.count[filled] * gaps) / self.count.sum())

    def rows(self) -> list[dict[str, Any]]:
        """The table as rows for JSON, without empty bins."""
        edges = np.linspace(0.5, 1.0, len(self.count) + 1)
        return [
            {
                "from": float(edges[i]),
                "to": float(edges[i + 1]),
                "pairs": int(self.count[i]),
                "confidence": float(self.confidence[i]),
                "accuracy": float(self.accuracy[i]),
            }
            for i in np.flatnonzero(self.count)
        ]


def reliability(preferences: Float[np.ndarray, " pairs"], *, bins: int = 10) -> Reliability:
    """Bins of pairs by confidence; the order of the responses in a pair does not matter.

    Args:
      preferences: the model's probability of the response that was preferred, in [0, 1].
      bins: equal parts of [1/2, 1]; 10 of them as wide as the 20 of [0, 1].

    Returns:
      The table; a tie (1/2) counts as half right.
    """
    p = np.asarray(preferences, np.float64)
    confidence = np.maximum(p, 1 - p)
    right = np.where(p == 0.5, 0.5, p > 0.5)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)

    def mean(values: np.ndarray) -> np.ndarray:
        total = np.bincount(index, weights=values, minlength=bins)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    return Reliability(count=count, confidence=mean(confidence), accuracy=mean(right))
