"""A backend that answers by a function: for tests alone."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxalign.backends import Decoding, Generation, Score
from jaxalign.backends.words import WordVectors


class Scripted:
    """`answer(text, sample)` writes; `likes(prompt, continuation)` is a log-prob."""

    def __init__(
        self,
        answer: Callable[[str, int], str] = lambda text, sample: "",
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
            row = [
                Generation(text=self.answer(text, sample), finished=True, tokens=1)
                for sample in range(samples)
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
