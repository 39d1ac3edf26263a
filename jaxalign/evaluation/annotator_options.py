"""Options of annotators, whatever their kind."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxalign.config import AtLeastOne, Positive
from jaxalign.data.plain_prompts import Chat
from jaxalign.evaluation.verdicts import as_they_come


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Judges that are models: on this machine (lm:, reward:), or an endpoint (openai:)."""

    template: Path | None = None
    """File with the question to a language model; it must contain {prompt}, {first} and {second},
    and ask for A or B; None: built in."""
    tokenizer: str | None = None
    """Tokenizer of a language model: folder or Hub name; None: the model's own."""
    max_length: AtLeastOne | None = None
    """Largest number of tokens in a question to a language model; None: the model's context."""
    batch_size: AtLeastOne = 8
    """Number of comparisons in a batch of a model on this machine."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of such a model's computation."""
    reward_rows: Literal["template", "end_token"] | None = None
    """Text that a reward model not trained here scores: the conversation in its chat template, or
    prompt and response with the end-of-sequence token; None: the template, if it has one."""
    chat: Chat = "auto"
    """Whether language models, and reward models from elsewhere, read the tokenizer's chat
    template; auto: if it has one."""
    workers: AtLeastOne = 8
    """Number of simultaneous requests to an endpoint."""
    timeout: Positive = 60.0
    """Time limit of a request to an endpoint, in seconds."""
    attempts: AtLeastOne = 4
    """Largest number of attempts for each comparison at an endpoint."""


@dataclass(frozen=True, kw_only=True)
class AnnotatorOptions(JudgeOptions):
    """What kinds of annotators depend on besides their name; each reads what it needs."""

    answers_file: Path | None = None
    """JSON Lines where answers are kept and found again; None keeps nothing."""
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = as_they_come
    """Wraps the answers, given their number, to show progress."""
