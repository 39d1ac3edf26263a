"""Interface of language models."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from jaxalign.data.records import Text
from jaxalign.errors import UserError

Prompt = Text
"""A text to continue, or the turns of a conversation to answer."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Decoding settings; hashable."""

    max_tokens: int = 256
    """Longest response in tokens."""
    temperature: float = 0.0
    """0: always the most likely token (greedy)."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens with this total probability; 1: all."""
    top_k: int = 0
    """Keep the k most likely tokens; 0: all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one; 0: all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the response so far become less likely."""
    stop: tuple[str, ...] = ()
    """Strings at which a response ends; they are not part of it."""
    seed: int = 0
    """Random seed; not every backend uses it."""

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
            raise UserError("stop: an empty string would stop at once; remove it")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One response."""

    text: str
    finished: bool
    """Whether it ended by itself or at a stop string; if not, it was truncated."""
    tokens: int
    """Number of tokens in the response."""
    failure: str = ""
    """Why there is no response; empty: there is one."""


Draft = Literal["none", "prompt_lookup"]
"""Where drafts of the next tokens come from; they change no response."""

WeightFormat = Literal["float", "int8"]
"""Format of a decoder's matrices while it generates: as loaded, or rounded to int8."""

Keep = Callable[[int, list[Generation]], None]
"""Called with the index of a prompt and its responses, as soon as they are complete."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Log-prob of a continuation."""

    log_prob: float
    """Sum over its tokens, in nats; NaN if prompt and continuation exceed the model's context."""
    tokens: int


@runtime_checkable
class Backend(Protocol):
    """A language model that generates, scores and embeds texts."""

    @property
    def identity(self) -> str:
        """What the results depend on besides the arguments: model and weights, or URL and name."""
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
          prompts: texts to continue, or conversations to answer.
          decoding: settings; a response is determined by the seed, its prompt and its sample index.
          samples: number of responses to each prompt.
          keep: called with every prompt's responses as soon as they are complete.
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
        """Vectors of length 1, whose inner products are similarities of texts."""
        ...


def draw_number(decoding: Decoding, prompt: Prompt, sample: int) -> int:
    """A number in [2^16, 2^31) that identifies a draw, a hash of the arguments.

    Args:
      decoding: with the seed.
      prompt: of the request.
      sample: index of the sample.
    """
    request = json.dumps([decoding.seed, prompt, sample], sort_keys=True)
    value = int.from_bytes(hashlib.sha256(request.encode()).digest()[:8])
    return 2**16 + value % (2**31 - 2**17)
