"""What every language model can be asked for."""

import hashlib
import json
from collections.abc import Callable, Sequence
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
    top_k: int = 0
    """Only the so many likeliest tokens; 0: all."""
    min_p: float = 0.0
    """Only tokens at least this times as likely as the likeliest; 0: all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the response so far are less likely to come again."""
    stop: tuple[str, ...] = ()
    """Texts at which a response ends; they are no part of it."""
    seed: int = 0
    """Of the draws, as far as the backend heeds it."""

    def __post_init__(self):
        if self.max_tokens < 1:
            raise UserError(f"max_tokens: {self.max_tokens} is not positive")
        if not self.temperature >= 0:
            raise UserError(f"temperature: {self.temperature} is negative; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is not in (0, 1]")
        if self.top_k < 0:
            raise UserError(f"top_k: {self.top_k} is negative; 0 keeps all tokens")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p: {self.min_p} is not in [0, 1]")
        if not self.repetition_penalty > 0:
            raise UserError(f"repetition_penalty: {self.repetition_penalty} is not positive")
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
    failure: str = ""
    """Why there is none, where the text is empty for that reason."""


Keep = Callable[[int, list[Generation]], None]
"""What is told the responses to a prompt, by its place, as soon as they are there."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How likely a continuation is."""

    log_prob: float
    """Sum over its tokens, in nats; NaN where it and its prompt do not fit the model's context."""
    tokens: int


@runtime_checkable
class Backend(Protocol):
    """A language model: it writes, says how likely a text is, and places texts in a space."""

    @property
    def identity(self) -> str:
        """What its answers depend on besides the arguments: model and weights, or URL and name."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        *,
        samples: int = 1,
        keep: Keep | None = None,
    ) -> list[list[Generation]]:
        """Responses, `samples` to each prompt.

        Args:
          prompts: texts to be continued, or conversations to be answered.
          decoding: how; a response depends on the seed, its prompt and its place among the
            samples alone, whatever else is asked for.
          samples: responses to each.
          keep: told of every prompt's responses as they come.
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


def draw_number(decoding: Decoding, prompt: Prompt, sample: int) -> int:
    """A number in [2^16, 2^31) that names a draw: the same for the same arguments, anywhere.

    Args:
      decoding: its seed.
      prompt: what is asked.
      sample: place among the samples.
    """
    said = json.dumps([decoding.seed, prompt, sample], sort_keys=True)
    value = int.from_bytes(hashlib.sha256(said.encode()).digest()[:8])
    return 2**16 + value % (2**31 - 2**17)
