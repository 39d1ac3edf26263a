"""Tokenised records: prompts and responses as flat arrays of tokens, and counts of what was cut."""

import functools
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from jaxalign.data.record_text import TextOf
from jaxalign.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TokenizedRows:
    """Prompts and responses as tokens: row i is `flat[offsets[i]:offsets[i + 1]]`, prompt first."""

    flat: np.ndarray
    """Int32, all rows one after the other."""
    offsets: np.ndarray
    """Int64 [rows + 1]."""
    prompt_length: np.ndarray
    """Int32 [rows], at least 1: tokens that are not scored; they come first, if `scored` does not
    say otherwise."""
    record_index: np.ndarray
    """Int64 [rows]: number of the record, from 0, in the order it was given."""
    scored: np.ndarray | None = None
    """Bool, of each token in `flat`: whether it is scored; None: all tokens after the prompts."""
    largest: int | None = None
    """Largest token, where it is stored; None: not known."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    @functools.cached_property
    def length(self) -> np.ndarray:
        """Int64 [rows]: tokens of prompt and response."""
        return np.diff(self.offsets)

    @property
    def begin(self) -> np.ndarray:
        """Int64 [rows]: tokens before the first that is scored."""
        if self.scored is None:
            return self.prompt_length.astype(np.int64)
        return np.array([self.scored_in(row)[0] for row in range(len(self))], np.int64)

    def scored_in(self, row: int) -> np.ndarray:
        """Int64 [scored]: where in a row the scored tokens lie."""
        if self.scored is None:
            return np.arange(self.prompt_length[row], self.offsets[row + 1] - self.offsets[row])
        return np.flatnonzero(self.scored[self.offsets[row] : self.offsets[row + 1]])


@dataclass(frozen=True, kw_only=True)
class TokenizedExamples:
    """Examples of a number of sides each, as tokens: row `sides` i + s is side s of example i."""

    rows: TokenizedRows
    sides: ClassVar[int]
    """Prompts with a response in an example."""

    def __len__(self) -> int:
        return len(self.rows) // self.sides

    @property
    def length(self) -> np.ndarray:
        """Int64 [examples, sides]."""
        return self.rows.length.reshape(-1, self.sides)

    @property
    def prompt_length(self) -> np.ndarray:
        """Int32 [examples, sides]."""
        return self.rows.prompt_length.reshape(-1, self.sides)

    @property
    def response_length(self) -> np.ndarray:
        """Int64 [examples, sides]: tokens that are scored."""
        return self.length - self.prompt_length

    @property
    def record_index(self) -> np.ndarray:
        """Int64 [examples]."""
        return self.rows.record_index[:: self.sides]


@dataclass(frozen=True, kw_only=True)
class TokenizedPairs(TokenizedExamples):
    """Pairs as tokens; rows 2 i and 2 i + 1 are chosen and rejected of pair i."""

    sides: ClassVar[int] = 2
    common: np.ndarray | None = None
    """Int64 [pairs]: tokens that both rows begin with, where they are stored; None: not known."""


@dataclass(frozen=True, kw_only=True)
class TokenizedResponses(TokenizedExamples):
    """Single responses as tokens, each an example of one side."""

    sides: ClassVar[int] = 1


@dataclass(frozen=True, kw_only=True)
class TokenizedTexts:
    """Documents as tokens, each with its beginning and end token."""

    flat: np.ndarray
    """Int32, all documents one after the other."""
    offsets: np.ndarray
    """Int64 [documents + 1]."""
    characters: int
    """Characters of all documents: for bits per character."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.flat[self.offsets[index] : self.offsets[index + 1]]


@dataclass(kw_only=True)
class TokenizeReport:
    """Counts of what tokenisation changed."""

    records: int = 0
    straddling: int = 0
    """Rows in which a token of the joint text spans the boundary: prompt and response were
    tokenised separately."""
    template_differs: int = 0
    """Rows whose chat template renders the prompt differently when no response follows: the prompt
    is the text before any response."""
    user_turns: int = 0
    """Rows whose response has turns of others between: these are read, but not scored."""
    truncated_prompts: int = 0
    """Rows whose prompt lost its beginning."""
    truncated_responses: int = 0
    """Rows whose response lost its end, and with it the end-of-sequence token."""
    identical: int = 0
    """Pairs left out because both responses have the same tokens (after truncation)."""
    unscored: int = 0
    """Pairs left out because truncation left nothing of a response that is scored."""
    refused: int = 0
    """Records left out because no text could be made of them, as when a chat template raises."""
    tokens: int = 0
    """Tokens kept."""
    refusals: list[str] = field(default_factory=list)
    """Place and reason of the first refused record, if any was refused."""
    notes: list[str] = field(default_factory=list)
    """Fields that the chat template ignores, and variables that it reads but nothing sets."""
    chat: list[str] = field(default_factory=list)
    """How plain prompts were rendered, if a rule decided it."""
    prompts_as_chat: int = 0
    """Plain prompts that went through the chat template, as a user's turn."""

    def summary(self) -> str:
        """One line for the log."""
        parts = [f"{self.records:,} records, {self.tokens:,} tokens"]
        for name in (
            "truncated_prompts",
            "truncated_responses",
            "straddling",
            "template_differs",
            "user_turns",
            "identical",
            "unscored",
            "prompts_as_chat",
        ):
            if count := getattr(self, name):
                parts.append(f"{name.replace('_', ' ')}: {count:,}")
        if self.refused:
            parts.append(f"refused: {self.refused:,} (as {self.refusals[0]})")
        return "; ".join(parts + self.notes)

    def add(self, other: "TokenizeReport") -> None:
        """Add the counts and notes of more records."""
        for name, found in vars(other).items():
            own = getattr(self, name)
            if name == "refusals":
                self.refusals = own or found
                continue
            joined = sorted({*own, *found}) if isinstance(found, list) else own + found
            setattr(self, name, joined)

    def note(self, in_text: TextOf) -> None:
        self.notes, self.chat = in_text.notes(), in_text.plain_prompt_notes()
        self.prompts_as_chat = in_text.plain_seen[True]


class RowWriter:
    """Collects rows into flat arrays."""

    def __init__(self):
        self._tokens: list[np.ndarray] = []
        self._scored: list[list[bool] | None] = []
        self._prompt: list[int] = []
        self._record: list[int] = []
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._tokens)

    def add(
        self, prompt: list[int], response: list[int], scored: list[bool] | None, record: int
    ) -> None:
        self._tokens.append(np.asarray(prompt + response, np.int32))
        self._scored.append(None if scored is None or all(scored) else scored)
        self._prompt.append(len(prompt) + (0 if scored is None else scored.count(False)))
        self._record.append(record)
        self.tokens += len(prompt) + len(response)

    def finish(self) -> TokenizedRows:
        lengths = [len(row) for row in self._tokens]
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        mask = None
        if any(scored is not None for scored in self._scored):
            mask = np.zeros(offsets[-1], bool)
            for end, length, prompt, scored in zip(
                offsets[1:], lengths, self._prompt, self._scored, strict=True
            ):
                own = [True] * (length - prompt) if scored is None else scored
                mask[end - len(own) : end] = own
        return TokenizedRows(
            flat=np.concatenate([np.empty(0, np.int32), *self._tokens]),
            offsets=offsets,
            prompt_length=np.asarray(self._prompt, np.int32),
            record_index=np.asarray(self._record, np.int64),
            scored=mask,
        )


def check_whole_responses(rows: TokenizedRows, what: str) -> None:
    """Raise `UserError` if a response has turns of others between, for what reads single ones.

    Args:
      rows: prompts and responses.
      what: reads them, for the message.
    """
    if rows.scored is not None:
        raise UserError(
            f"{what}: reads responses of a single turn, but some have turns of others between; "
            "move all turns but the last into the prompt"
        )
