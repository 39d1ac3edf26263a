"""Whether preferences go in circles: what no reward can express."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxalign.evaluation.verdicts import Annotator


@dataclass(frozen=True, kw_only=True)
class Circles:
    """How many triples of responses have no winner."""

    violations: int
    triples: int
    """Triples with three verdicts."""

    @property
    def rate(self) -> float:
        """Share of the triples; 0 for every reward model, 1/4 for a fair coin, NaN for none."""
        return self.violations / self.triples if self.triples else float("nan")


def transitivity_violations(
    annotator: Annotator,
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    *,
    triples: int = 1000,
    seed: int = 0,
) -> Circles:
    r"""How often an annotator prefers a to b, b to c, and c to a.

    .. math:: p(a \succ b), \; p(b \succ c), \; p(c \succ a)
              \quad \text{all above or all below} \quad \tfrac12

    Args:
      annotator: what is asked about three pairs of each triple.
      prompts: texts.
      responses: of each prompt, some texts; prompts with fewer than three different ones are
        passed over.
      triples: how many are drawn, with replacement: a prompt, then three of its responses.
      seed: of the draw.

    References:
      Munos et al., 2023, arXiv:2312.00886, section 3 (preferences that no reward expresses).
    """
    different = [sorted(set(texts)) for texts in responses]
    usable = [number for number, texts in enumerate(different) if len(texts) >= 3]
    if not usable:
        return Circles(violations=0, triples=0)
    rng = np.random.default_rng(seed)
    asked: list[tuple[str, str, str]] = []
    for number in rng.choice(usable, size=triples):
        a, b, c = (different[number][at] for at in rng.permutation(len(different[number]))[:3])
        asked += [(prompts[number], x, y) for x, y in ((a, b), (b, c), (c, a))]
    verdicts = annotator.preferences(*map(list, zip(*asked, strict=True)))
    around = verdicts.preference.reshape(-1, 3)
    around = around[np.isfinite(around).all(1)]
    circular = (around > 0.5).all(1) | (around < 0.5).all(1)
    return Circles(violations=int(circular.sum()), triples=len(around))
