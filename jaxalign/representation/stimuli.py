"""The same responses under several instructions, as tokens: what is tuned on and compared."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from jaxalign.data import (
    PreferenceRecord,
    PromptResponseRecord,
    TokenizedPairs,
    TokenizedRows,
    tokenize_responses,
)
from jaxalign.data.plain_prompts import Chat, plain_prompts
from jaxalign.data.records import Conversation, Message, Text, plain_text, tools_of, transcript
from jaxalign.errors import UserError, notice_once
from jaxalign.representation.instructions import Instructions

WHOLE = 2**30
"""No row is longer: nothing is cut, for the instruction is what would go first."""


@dataclass(kw_only=True)
class StimulusReport:
    """What became of responses: those left out are counted by reason and the first one named."""

    records: int = 0
    tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    """Reason -> file and line."""
    chat: list[str] = field(default_factory=list)
    """How plain queries were read, where a rule decided it."""

    def skip(self, reason: str, place: str) -> None:
        """Count one that is left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.first.setdefault(reason, place)

    def summary(self) -> str:
        """One line for messages."""
        parts = [
            f"{number} {why} (first: {self.first[why]})" for why, number in self.skipped.items()
        ]
        return "; ".join([f"{self.records} responses", *parts])


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """How text becomes tokens; the fields of `tokenize_responses`."""

    tokenizer: Any
    max_length: int
    """Longest instruction, query and response together; longer stimuli are left out, not cut."""
    prompt_format: str = "{prompt}"
    chat: Chat = "auto"
    end_token: bool = True


@dataclass(frozen=True, kw_only=True)
class Stimuli:
    """Responses, each in as many rows as there are instructions; row i of all has one response."""

    streams: tuple[TokenizedRows, ...]
    report: StimulusReport


def instructed(prompt: Text, instruction: str, *, strings_as_chat: bool) -> Text:
    """A conversation that begins with the instruction as the system's turn; text as it is."""
    text = plain_text(prompt)
    if text is not None and not strings_as_chat:
        return text
    turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    own = Message(role="system", content=instruction)
    return Conversation([own, *turns], tools=tools_of(prompt))


def tokenize_stimuli(
    records: Sequence[PromptResponseRecord],
    how: Tokenization,
    instructions: Sequence[str | None],
) -> Stimuli:
    r"""The same responses under each instruction, left out where one of the rows is unusable.

    A plain prompt reads as instruction, empty line, the prompt in its format; without an
    instruction it is the prompt in its format alone. A conversation gets the instruction as
    its system's turn.

    Args:
      records: queries and responses.
      how: tokenizer and format.
      instructions: one for each stream; None: no instruction.

    Raises:
      UserError: no response is left; says why.
    """
    report = StimulusReport(records=len(records))
    line = plain_prompts(how.tokenizer, how.chat, prompt_format=how.prompt_format).line
    if line is not None and any(plain_text(record.prompt) is not None for record in records):
        notice_once(line)
        report.chat.append(line)
    streams = [_stream(records, how, instruction) for instruction in instructions]
    kept = []
    for number, record in enumerate(records):
        rows = [stream[number] for stream in streams]
        lengths = [int(stream.prompt_length[number]) for stream in streams]
        responses = [row[length:] for row, length in zip(rows, lengths, strict=True)]
        longest = max(len(row) for row in rows)
        place = f"{record.source}:{record.line}"
        if not transcript(record.prompt).strip():
            report.skip("no query", place)
        elif longest > how.max_length:
            report.skip("stimulus too long", f"{place}: {longest} tokens")
        elif any(not np.array_equal(responses[0], other) for other in responses):
            report.skip("response tokenised differently", place)
        else:
            kept.append(number)
    if not kept:
        raise UserError(
            f"max_length: {how.max_length}: no stimulus is left of {report.summary()}; raise it, "
            "or set --alignment.instructions short"
        )
    selected = tuple(_rows(stream, kept) for stream in streams)
    report.tokens = sum(int(stream.length.sum()) for stream in selected)
    return Stimuli(streams=selected, report=report)


def _stream(
    records: Sequence[PromptResponseRecord], how: Tokenization, instruction: str | None
) -> TokenizedRows:
    layout, told, chat = how.prompt_format, list(records), how.chat
    if instruction is not None:
        turns = plain_prompts(how.tokenizer, how.chat, prompt_format=layout).as_turns
        chat = "always" if turns else "never"  # the instruction is no format of the user's
        layout = "{prompt}" if turns else f"{instruction}\n\n{layout}"
        told = [
            replace(one, prompt=instructed(one.prompt, instruction, strings_as_chat=turns))
            for one in records
        ]
    rows, _ = tokenize_responses(
        told,
        how.tokenizer,
        max_length=WHOLE,
        prompt_format=layout,
        chat=chat,
        end_token=how.end_token,
    )
    return rows


def _rows(rows: TokenizedRows, members: Sequence[int]) -> TokenizedRows:
    """Some rows, in that order; their record numbers stay."""
    at = np.asarray(members)
    return joined_rows(
        [rows[int(member)] for member in at], rows.prompt_length[at], rows.record_index[at]
    )


def joined_rows(
    tokens: Sequence[np.ndarray], prompt_length: np.ndarray, record_index: np.ndarray
) -> TokenizedRows:
    """Rows one after the other."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in tokens], dtype=np.int64)])
    return TokenizedRows(
        flat=np.concatenate(list(tokens)),
        offsets=offsets,
        prompt_length=np.asarray(prompt_length, np.int32),
        record_index=np.asarray(record_index, np.int64),
    )


def responses_of(
    records: Sequence[PreferenceRecord],
    which: Literal["chosen", "rejected", "both", "random"],
    *,
    seed: int = 0,
) -> list[PromptResponseRecord]:
    """Responses of pairs: one side, both (chosen before rejected), or one at random.

    Args:
      records: pairs.
      which: "random" takes either with probability 1/2, as the paper does for SCIT; "both" is
        what it does for Dual.
      seed: of the coin.
    """
    coin = np.random.default_rng([seed, 0x5C17]).random(len(records)) < 0.5
    sides: dict[str, Callable[[int], tuple[str, ...]]] = {
        "chosen": lambda _: ("chosen",),
        "rejected": lambda _: ("rejected",),
        "both": lambda _: ("chosen", "rejected"),
        "random": lambda at: ("chosen",) if coin[at] else ("rejected",),
    }
    return [
        PromptResponseRecord(
            prompt=record.prompt,
            response=getattr(record, side),
            source=record.source,
            line=record.line,
        )
        for at, record in enumerate(records)
        for side in sides[which](at)
    ]


def contrastive_pairs(
    records: Sequence[PreferenceRecord], how: Tokenization, told: Instructions
) -> tuple[TokenizedPairs, StimulusReport]:
    """Rows for contrastive instruction tuning: a response under its own and the other instruction.

    The chosen response agrees with the positive instruction, the rejected one with the negative;
    the pair's first row is the one that agrees.

    Args:
      records: pairs; each gives two.
      how: tokenizer and format.
      told: the two instructions.

    Raises:
      UserError: no response is left.

    References:
      Liu et al., 2024, arXiv:2312.15997 (RAHF-SCIT).
    """
    both = responses_of(records, "both")
    stimuli = tokenize_stimuli(both, how, (told.positive, told.negative))
    rows, prompts, numbers = [], [], []
    for at, response in enumerate(stimuli.streams[0].record_index):
        for stream in stimuli.streams if response % 2 == 0 else stimuli.streams[::-1]:
            rows.append(stream[at])
            prompts.append(stream.prompt_length[at])
            numbers.append(response // 2)
    pairs = joined_rows(rows, np.asarray(prompts), np.asarray(numbers))
    return TokenizedPairs(rows=pairs), stimuli.report


def hindsight_rows(
    records: Sequence[PreferenceRecord], how: Tokenization, told: Instructions
) -> tuple[TokenizedRows, StimulusReport]:
    """Rows for hindsight instruction relabelling: each response under the instruction it follows.

    Args:
      records: pairs; each gives two rows.
      how: tokenizer and format.
      told: the positive instruction for chosen, the negative for rejected responses.

    Raises:
      UserError: no response is left.

    References:
      Zhang et al., 2023, arXiv:2302.05206; as a baseline in arXiv:2312.15997.
    """
    both = responses_of(records, "both")
    stimuli = tokenize_stimuli(both, how, (told.positive, told.negative))
    numbers = stimuli.streams[0].record_index

    def own() -> Iterator[tuple[np.ndarray, int]]:
        for at, response in enumerate(numbers):
            stream = stimuli.streams[int(response) % 2]
            yield stream[at], int(stream.prompt_length[at])

    rows, prompts = zip(*own(), strict=True)
    return joined_rows(rows, np.asarray(prompts), numbers // 2), stimuli.report
