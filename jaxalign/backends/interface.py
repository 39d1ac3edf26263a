"""What every language model can be asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from jaxalign.data.records import Text
from jaxalign.errors import UserError

Prompt = Text
"""A text to be continued, or the turns of a conversation to be answered."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How responses are drawn; hashable."""

    max_tokens: int = 256
    """Longest response."""
    temperature: float = 0.0
    """0 takes the likeliest token each time (greedy)."""
    top_p: float = 1.0
    """Only the fewest likeliest tokens whose probability adds up to this."""
    stop: tuple[str, ...] = ()
    """Texts at which a response ends; they are no part of it."""
    seed: int = 0
    """Of the draws, as far as the backend heeds it."""

    def __post_init__(self):
        if self.max_tokens < 1:
            raise UserError(f"max_tokens: {self.max_tokens} is not positive")
        if self.temperature < 0:
            raise UserError(f"temperature: {self.temperature} is negative; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is not in (0, 1]")
        if "" in self.stop:
            raise UserError("stop: an empty string would stop at once; leave it out")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One response."""

    text: str
    finished: bool
    """Whether it ended or was stopped; if not, it was cut at the most tokens allowed."""
    tokens: int
    """Of the response."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How likely a continuation is."""

    log_prob: float
    """Sum over its tokens, in nats."""
    tokens: int


@runtime_checkable
class Backend(Protocol):
    """A language model: it writes, says how likely a text is, and places texts in a space."""

    @property
    def identity(self) -> str:
        """What its answers depend on besides the arguments: model and weights, or URL and name."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], decoding: Decoding, *, samples: int = 1, first: int = 0
    ) -> list[list[Generation]]:
        """Responses, `samples` to each prompt.

        Args:
          prompts: texts to be continued, or conversations to be answered.
          decoding: how.
          samples: responses to each.
          first: number of the first prompt among all; with the seed it decides the draws, so that
            a part asked for later is what it would have been.
        """
        ...

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[Score]:
        """Log-probs of one continuation after each prompt.

        Args:
          prompts: n texts or conversations.
          continuations: one after each.
        """
        ...

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "n width"]:
        """Vectors of length 1, whose inner products say how alike texts are."""
        ...
