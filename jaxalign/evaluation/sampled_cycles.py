"""Whether an annotator's preferences go in circles, which no reward can express."""

from collections.abc import Sequence

import numpy as np

from jaxalign.evaluation.bradley_terry import Cycles, cycles
from jaxalign.evaluation.verdicts import Annotator


def sampled_cycles(
    annotator: Annotator,
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    *,
    triples: int = 1000,
    seed: int = 0,
) -> Cycles:
    r"""How often an annotator prefers a to b, b to c, and c to a.

    .. math:: p(a \succ b), \; p(b \succ c), \; p(c \succ a)
              \quad \text{all above or all below} \quad \tfrac12

    Args:
      annotator: what is asked about the three pairs of each triple.
      prompts: texts.
      responses: of each prompt, some texts; prompts with fewer than three different ones are
        passed over.
      triples: how many are drawn, with replacement: a prompt, then three of its responses.
      seed: of the draw.
    """
    different = [sorted(set(texts)) for texts in responses]
    usable = [number for number, texts in enumerate(different) if len(texts) >= 3]
    if not usable:
        return Cycles(cyclic=0, triples=0)
    rng = np.random.default_rng(seed)
    sides = (0, 1), (1, 2), (2, 0)
    asked: list[tuple[str, str, str]] = []
    for number in rng.choice(usable, size=triples):
        prompt, of_prompt = prompts[int(number)], different[int(number)]
        texts = [of_prompt[int(at)] for at in rng.permutation(len(of_prompt))[:3]]
        asked += [(prompt, texts[i], texts[j]) for i, j in sides]
    columns = [list(column) for column in zip(*asked, strict=True)]
    preference = annotator.preferences(*columns).preference.reshape(-1, 3)
    games = np.full((triples, 3, 3), np.nan)
    for at, (i, j) in enumerate(sides):
        games[:, i, j], games[:, j, i] = preference[:, at], 1 - preference[:, at]
    return cycles(games)
