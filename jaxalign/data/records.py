"""Records: text with the source and line that it came from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

ASKING = frozenset({"user", "human", "system", "developer"})
RETURNING = frozenset(
    {"tool", "tool_response", "function", "ipython", "observation", "environment"}
)
"""Roles of turns with what a tool returned."""
NOT_RESPONDING = ASKING | RETURNING
"""Roles of turns with which a response may not begin or end; no loss is on their tokens."""
RESPONDING = frozenset({"assistant", "model", "gpt"})
"""Roles of turns that a model writes."""


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
    """Turns, and the other inputs of their chat template."""

    def __init__(
        self, turns: Iterable[Message], *, tools: Sequence[Any] = (), text: str | None = None
    ):
        super().__init__(turns)
        self.tools = tuple(tools)
        """Schemas of functions that may be called."""
        self.text = text
        """The original prompt, if it was text with a column for the system turn or the tools."""


def tools_of(text: Text) -> tuple[Any, ...]:
    """The tools that come with a conversation."""
    return text.tools if isinstance(text, Conversation) else ()


def plain_text(text: Text) -> str | None:
    """The text of a plain prompt; None for a conversation."""
    return text.text if isinstance(text, Conversation) else text if isinstance(text, str) else None


def transcript(text: Text) -> str:
    """Text unchanged; a conversation with one turn per line."""
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
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """All fields of the record, if they were asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnpairedRecord:
    """A prompt, one response, and whether it is desirable."""

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
