"""A backend that answers by a function: for tests alone."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxalign.backends import Decoding, Generation, Score
from jaxalign.backends.words import WordVectors


class Scripted:
    """`answer(text, sample)` writes, or None: no text; `likes(prompt, continuation)`: log-prob."""

    def __init__(
        self,
        answer: Callable[[str, int], str | None] = lambda text, sample: "",
        likes: Callable[[str, str], float] = lambda prompt, continuation: 0.0,
        identity: str = "scripted",
    ):
        self.answer, self.likes, self.identity = answer, likes, identity
        self.asked: list[str] = []

    def generate(self, prompts, decoding: Decoding, *, samples=1, keep=None):
        found = []
        for at, prompt in enumerate(prompts):
            text = prompt if isinstance(prompt, str) else "\n".join(t["content"] for t in prompt)
            self.asked.append(text)
            said = [self.answer(text, sample) for sample in range(samples)]
            row = [
                Generation(text="", finished=False, tokens=0, failure="no text")
                if one is None
                else Generation(text=one, finished=True, tokens=1)
                for one in said
            ]
            found.append(row)
            if keep is not None:
                keep(at, row)
        return found

    def score(self, prompts, continuations: Sequence[str]) -> list[Score]:
        return [
            Score(log_prob=self.likes(prompt, continuation), tokens=1)
            for prompt, continuation in zip(prompts, continuations, strict=True)
        ]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return WordVectors().embed(texts)
