"""Several responses to each prompt, with what an annotator thinks of them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from jaxalign.backends import Backend, Decoding, Prompt
from jaxalign.backends.cached import AnswerFile, key_of
from jaxalign.collection.writing import batches
from jaxalign.data.records import Text, transcript


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Responses to a prompt."""

    number: int
    """Of the prompt."""
    prompt: Text
    responses: Sequence[str]
    """Each once: equal samples are one candidate."""
    rewards: Float64[np.ndarray, " responses"]
    """Of a reward model or a rule; else the mean preference over the other candidates."""
    without_reward: int = 0
    """Further responses, of which the annotator could say nothing."""


def sampled_candidates(
    backend: Backend,
    prompts: Sequence[Prompt],
    annotator: Any,
    decoding: Decoding,
    *,
    samples: int,
    batch_size: int = 8,
    kept: tuple[AnswerFile, str] | None = None,
) -> Iterator[Candidates]:
    """Candidates prompt by prompt, as they come.

    Args:
      backend: draws the responses.
      prompts: texts or conversations.
      annotator: `rewards(prompts, responses)`, or else `preferences(prompts, first, second)`.
      decoding: with a temperature.
      samples: responses to each prompt.
      batch_size: prompts at a time.
      kept: where rewards are kept and found again, and the annotator's name.
    """
    numbered = list(enumerate(prompts))
    for some in batches(numbered, batch_size):
        found = backend.generate([prompt for _, prompt in some], decoding, samples=samples)
        texts = [list(dict.fromkeys(one.text for one in row if one.text.strip())) for row in found]
        asked = [transcript(prompt) for _, prompt in some]
        for (number, prompt), responses, rewards in zip(
            some, texts, _rewards(annotator, asked, texts, kept), strict=True
        ):
            known = np.isfinite(rewards)
            if responses:
                yield Candidates(
                    number=number,
                    prompt=prompt,
                    responses=[text for text, one in zip(responses, known, strict=True) if one],
                    rewards=rewards[known],
                    without_reward=int((~known).sum()),
                )


def _rewards(
    annotator: Any,
    prompts: Sequence[str],
    texts: Sequence[Sequence[str]],
    kept: tuple[AnswerFile, str] | None,
) -> list[np.ndarray]:
    keys = [
        key_of("rewards", kept and kept[1], p, list(row))
        for p, row in zip(prompts, texts, strict=True)
    ]
    known = [None if kept is None else kept[0].find(key) for key in keys]
    missing = [at for at, one in enumerate(known) if one is None]
    asked = [prompts[at] for at in missing], [texts[at] for at in missing]
    for at, rewards in zip(missing, rewards_of(annotator, *asked), strict=True):
        known[at] = rewards.tolist()
        if kept is not None and np.isfinite(rewards).all():  # else it is asked again
            kept[0].add(keys[at], known[at])
    return [np.array(one, np.float64) for one in known]


def rewards_of(
    annotator: Any, prompts: Sequence[str], texts: Sequence[Sequence[str]]
) -> list[np.ndarray]:
    r"""Rewards of responses; from preferences alone, the mean of those over the other responses.

    .. math:: r(y_i) = \frac{1}{n - 1} \sum_{j \neq i} p(y_i \succ y_j)

    Args:
      annotator: as in `sampled_candidates`; a comparison without a verdict counts as a tie, and a
        response without any verdict has no reward (NaN).
      prompts: n texts.
      texts: the responses to each.
    """
    if hasattr(annotator, "rewards"):
        asked = [p for p, row in zip(prompts, texts, strict=True) for _ in row]
        flat = [text for row in texts for text in row]
        given = np.asarray(annotator.rewards(asked, flat), np.float64) if flat else np.zeros(0)
        return np.split(given, np.cumsum([len(row) for row in texts])[:-1]) if texts else []
    pairs = [(at, i, j) for at, row in enumerate(texts) for i in range(len(row)) for j in range(i)]
    if not pairs:
        return [np.full(len(row), 0.5) for row in texts]
    said = annotator.preferences(
        [prompts[at] for at, _, _ in pairs],
        [texts[at][i] for at, i, _ in pairs],
        [texts[at][j] for at, _, j in pairs],
    ).preference
    sums = [np.zeros(len(row)) for row in texts]
    judged = [np.zeros(len(row), bool) for row in texts]
    for (at, i, j), value in zip(pairs, said, strict=True):
        if math.isfinite(value):
            judged[at][[i, j]] = True
        share = value if math.isfinite(value) else 0.5
        sums[at][i] += share
        sums[at][j] += 1 - share
    return [
        np.where(known, s / (len(s) - 1), np.nan) if len(s) > 1 else np.full(len(s), 0.5)
        for s, known in zip(sums, judged, strict=True)
    ]
