"""What a source yields: text with the place it came from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

ASKING = frozenset({"user", "human", "system", "developer"})
NOT_RESPONDING = ASKING | {"tool"}
"""Roles whose turns no response begins or ends with."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[Sequence[Any]]
    """Each with a function's name and its arguments as a mapping."""
    tool_call_id: NotRequired[str]
    reasoning_content: NotRequired[str]


Text = str | Sequence[Message]
"""Plain text, or the turns of a conversation that a chat template makes into text."""


class Conversation(list[Message]):
    """Turns, and what their chat template is given beside them."""

    def __init__(
        self, turns: Iterable[Message], *, tools: Sequence[Any] = (), text: str | None = None
    ):
        super().__init__(turns)
        self.tools = tuple(tools)
        """Schemas of functions that may be called."""
        self.text = text
        """The prompt as it stood, where it was text beside a column for the system or the tools."""


def tools_of(text: Text) -> tuple[Any, ...]:
    """The tools that come with a conversation."""
    return text.tools if isinstance(text, Conversation) else ()


def plain_text(text: Text) -> str | None:
    """The text of what is no conversation; None where it is one."""
    return text.text if isinstance(text, Conversation) else text if isinstance(text, str) else None


def transcript(text: Text) -> str:
    """Text as it is; a conversation as its turns, one a line."""
    if isinstance(text, str):
        return text
    return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in text)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceRecord:
    """A prompt and two responses of which the first was preferred."""

    prompt: Text
    chosen: Text
    rejected: Text
    source: str
    """File or data set."""
    line: int
    """Line of a text file, else number of the record; from 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptResponseRecord:
    """A prompt and the response to imitate."""

    prompt: Text
    response: Text
    source: str
    line: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRecord:
    """A prompt to respond to."""

    prompt: Text
    source: str
    line: int


@dataclass(frozen=True, kw_only=True, slots=True)
class UnpairedRecord:
    """A prompt, one response, and whether it was liked."""

    prompt: Text
    completion: Text
    label: bool
    source: str
    line: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRecord:
    """A document."""

    text: str
    source: str
    line: int


def shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Number of leading items (characters, turns) that two sequences share."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
