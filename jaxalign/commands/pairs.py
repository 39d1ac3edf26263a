"""Flags of commands that look at the pairs of a model without training."""

from dataclasses import dataclass
from typing import Annotated

from jaxalign.config import AtLeastOne, Range
from jaxalign.flags import BadRecords, Chat


@dataclass(frozen=True, kw_only=True)
class ModelAndData:
    """What pairs are of."""

    model: str
    """Model: Hugging Face folder, Hub name, run folder or GGUF file."""
    data: str
    """Preference pairs, as --data of `jaxalign train`."""


@dataclass(frozen=True, kw_only=True)
class PairReading:
    """How a model reads pairs."""

    tokenizer: str | None = None
    """Tokenizer: folder or Hub name; None: the model's own."""
    max_length: Annotated[int, Range("[2, inf)")] = 256
    """Largest number of tokens in prompt and response together."""
    prompt_format: str = "{prompt}"
    """Text around a plain prompt."""
    chat: Chat = "auto"
    """Whether plain prompts go through the tokenizer's chat template, as a user's turn; auto: where
    it has one, but not with a --prompt-format, and models trained here as they were trained."""
    bad_records: BadRecords = "error"
    """Response to a record that cannot be used: stop and name its line, or skip it."""
    batch_size: AtLeastOne = 8
    """Number of pairs in a batch."""


@dataclass(frozen=True, kw_only=True)
class PairOptions(PairReading, ModelAndData):
    """A model and preference pairs; the arguments of `load_pairs`."""
