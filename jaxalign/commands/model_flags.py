"""Flags of the commands in which a model writes, each in one place."""

from dataclasses import dataclass
from typing import Any

from jaxalign.backends import BackendOptions, Decoding
from jaxalign.config import AtLeastOne, Fraction, NonNegative, Positive, Seed
from jaxalign.flags import Chat


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How texts are sampled."""

    max_tokens: AtLeastOne = 128
    """Largest number of tokens in each generated text."""
    temperature: NonNegative = 1.0
    """Sampling temperature; 0: greedy decoding."""
    top_p: Fraction = 1.0
    """Keep the most likely tokens that hold this fraction of the probability; 1: all."""
    stop: tuple[str, ...] = ()
    """Strings that end a response."""
    seed: Seed = 0
    """Seed of the sampling."""

    def decoding(self, **more: Any) -> Decoding:
        """The same as `Decoding`.

        Args:
          **more: fields of `Decoding` that have no flag here.
        """
        return Decoding(**vars(self), **more)


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """How models run on this machine, and how they are requested from an endpoint (openai:)."""

    batch_size: AtLeastOne = 8
    """Number of prompts in a batch of a local model."""
    workers: AtLeastOne | None = None
    """Number of simultaneous requests to an endpoint; None: --batch-size."""
    requests_per_minute: Positive | None = None
    """Largest number of requests per minute to an endpoint; None: no limit."""
    completions: bool = False
    """Use the completions API of an endpoint, for base models (of --model, in optimize-prompt)."""
    chat: Chat = "auto"
    """Whether plain prompts go through the tokenizer's chat template, as a user's turn; auto: if
    it has one, but not with a --prompt-format, and models trained here as they were trained."""

    def backend_options(self, **more: Any) -> BackendOptions:
        """The same as `BackendOptions`.

        Args:
          **more: fields of `BackendOptions` that have no flag here.
        """
        options: dict[str, Any] = {**vars(self), "workers": self.workers or self.batch_size}
        return BackendOptions(**options, **more)
