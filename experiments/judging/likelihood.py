"""A judge that asks nothing: which response a model would sooner write."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxalign.backends import Backend
from jaxalign.evaluation import Verdicts

TOO_LONG = "longer than the model's context"


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    r"""Prefers the response with the larger log-prob per token.

    .. math:: \frac{1}{|y|} \log\pi(y \mid x), \quad\text{less}\quad
        \frac{1}{|y|} \log\pi(y) \quad\text{where the request is to count alone.}

    Attributes:
      backend: scores texts.
      gained: count what the request adds.
    """

    backend: Backend
    gained: bool = False

    def scores(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Of each response; NaN where it does not fit the context."""
        said = [f" {response.strip()}" for response in responses]
        asked = [f"\n\nHuman: {prompt.strip()}\n\nAssistant:" for prompt in prompts]
        found = self.backend.score(asked, said)
        values = np.array([one.log_prob / max(one.tokens, 1) for one in found])
        if self.gained:
            alone = self.backend.score(["\n\nAssistant:"] * len(said), said)
            values -= np.array([one.log_prob / max(one.tokens, 1) for one in alone])
        return values

    def preferences(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> Verdicts:
        """As in `Annotator`."""
        found = self.scores([*prompts, *prompts], [*first, *second])
        gap = found[: len(first)] - found[len(first) :]
        reasons = tuple("" if np.isfinite(one) else TOO_LONG for one in gap)
        return Verdicts(preference=0.5 + 0.5 * np.sign(gap), reasons=reasons)
