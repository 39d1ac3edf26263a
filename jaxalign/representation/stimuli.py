"""Stimuli: the same responses under several instructions, as tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np

from jaxalign.data import (
    PreferenceRecord,
    PromptResponseRecord,
    TokenizedPairs,
    TokenizedRows,
    tokenize_responses,
)
from jaxalign.data.plain_prompts import Chat, plain_prompts
from jaxalign.data.reading import REFUSED, BadRecords
from jaxalign.data.record_index import IndexedRecords
from jaxalign.data.records import Conversation, Message, Text, plain_text, tools_of, transcript
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.errors import UserError, notice_once
from jaxalign.representation.instructions import Instructions

Side = Literal["chosen", "rejected"]
WHOLE = 2**30
"""A length above that of all rows: truncation would cut the instruction first."""


@dataclass(kw_only=True)
class StimulusReport:
    """Counts of responses; skipped ones are counted by reason, with the source of the first."""

    records: int = 0
    tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    """Reason -> file and line."""
    chat: list[str] = field(default_factory=list)
    """The choice of chat template for plain queries, if `auto` made it."""

    def skip(self, reason: str, source: str) -> None:
        """Count a skipped response."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.first.setdefault(reason, source)

    def summary(self) -> str:
        """One line for messages."""
        parts = [
            f"{number} {why} (first: {self.first[why]})" for why, number in self.skipped.items()
        ]
        return "; ".join([f"{self.records} responses", *parts])


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """Options of `tokenize_responses`."""

    tokenizer: Tokenizer
    max_length: int
    """Largest number of tokens of a stimulus; longer ones are skipped, not truncated."""
    prompt_format: str = "{prompt}"
    chat: Chat = "auto"
    end_token: bool = True
    bad_records: BadRecords = "error"
    """Response to a record that the chat template refuses: an error, or it is skipped."""


@dataclass(frozen=True, kw_only=True)
class Stimuli:
    """Responses, with one stream of rows per instruction; row i of all has the same response."""

    streams: tuple[TokenizedRows, ...]
    report: StimulusReport


def instructed(prompt: Text, instruction: str, *, strings_as_chat: bool) -> Text:
    """A conversation with the instruction as its system turn; plain text is unchanged."""
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
    r"""The same responses under each instruction, without those that have an unusable row.

    A plain prompt becomes the instruction, an empty line and the formatted prompt; without an
    instruction, the formatted prompt. A conversation gets the instruction as its system turn.

    Args:
      records: queries and responses.
      how: tokenizer and format.
      instructions: one for each stream; None: no instruction.

    Raises:
      UserError: no response is left; gives the reasons.
    """
    report = StimulusReport(records=len(records))
    line = plain_prompts(how.tokenizer, how.chat, prompt_format=how.prompt_format).line
    if line is not None and any(plain_text(record.prompt) is not None for record in records):
        notice_once(line)
        report.chat.append(line)
    made = [_stream(records, how, instruction) for instruction in instructions]
    streams, refusals = [rows for rows, _ in made], [one for _, found in made for one in found]
    rows_of = [{int(x): at for at, x in enumerate(rows.record_index)} for rows in streams]
    begins = [stream.begin for stream in streams]
    kept: list[list[int]] = []
    for number, record in enumerate(records):
        if any(number not in known for known in rows_of):
            report.skip(REFUSED, refusals[0])
            continue
        own = [known[number] for known in rows_of]
        rows = [stream[at] for stream, at in zip(streams, own, strict=True)]
        lengths = [int(stream.prompt_length[at]) for stream, at in zip(streams, own, strict=True)]
        responses = [row[length:] for row, length in zip(rows, lengths, strict=True)]
        longest = max(len(row) for row in rows)
        source = f"{record.source}:{record.line}"
        if not transcript(record.prompt).strip():
            report.skip("no query", source)
        elif any(
            begin[at] != length for begin, at, length in zip(begins, own, lengths, strict=True)
        ):
            report.skip("turns of others in the response", source)
        elif longest > how.max_length:
            report.skip("stimulus too long", f"{source}: {longest} tokens")
        elif any(not np.array_equal(responses[0], other) for other in responses):
            report.skip("response tokenised differently", source)
        else:
            kept.append(own)
    if not kept:
        none = f"no stimulus is left of {report.summary()}"
        if "stimulus too long" not in report.skipped and REFUSED in report.skipped:
            raise UserError(
                f"{none}; instructions are system turns: --chat never keeps plain prompts plain, "
                "or give a --tokenizer whose template takes them"
            )
        raise UserError(
            f"max_length: {how.max_length}: {none}; raise it, or set --alignment.instructions short"
        )
    selected = tuple(
        _rows(stream, members)
        for stream, members in zip(streams, zip(*kept, strict=True), strict=True)
    )
    report.tokens = sum(int(stream.length.sum()) for stream in selected)
    return Stimuli(streams=selected, report=report)


def _stream(
    records: Sequence[PromptResponseRecord], how: Tokenization, instruction: str | None
) -> tuple[TokenizedRows, list[str]]:
    """The rows under an instruction, and why the first record without one has none."""
    layout, chat = how.prompt_format, how.chat
    if instruction is not None:
        turns = plain_prompts(how.tokenizer, how.chat, prompt_format=layout).as_turns
        chat = "always" if turns else "never"  # the layout is not the user's own prompt_format
        layout = "{prompt}" if turns else f"{instruction}\n\n{layout}"
        records = [
            replace(one, prompt=instructed(one.prompt, instruction, strings_as_chat=turns))
            for one in records
        ]
    rows, report = tokenize_responses(
        records,
        how.tokenizer,
        max_length=WHOLE,
        prompt_format=layout,
        chat=chat,
        end_token=how.end_token,
        bad_records=how.bad_records,
        may_be_empty=True,
    )
    return rows, report.refusals


def _rows(rows: TokenizedRows, members: Sequence[int]) -> TokenizedRows:
    """Some rows in the given order, with their record numbers."""
    at = np.asarray(members)
    return joined_rows(
        [rows[int(member)] for member in at], rows.prompt_length[at], rows.record_index[at]
    )


def joined_rows(
    tokens: Sequence[np.ndarray], prompt_length: np.ndarray, record_index: np.ndarray
) -> TokenizedRows:
    """Rows from their tokens."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in tokens], dtype=np.int64)])
    return TokenizedRows(
        flat=np.concatenate(list(tokens)),
        offsets=offsets,
        prompt_length=np.asarray(prompt_length, np.int32),
        record_index=np.asarray(record_index, np.int64),
    )


def response_of(record: PreferenceRecord, side: Side) -> PromptResponseRecord:
    """The prompt of a pair with one of its responses."""
    return PromptResponseRecord(
        prompt=record.prompt,
        response=record.chosen if side == "chosen" else record.rejected,
        source=record.source,
        line=record.line,
    )


def responses_of(
    records: Sequence[PreferenceRecord],
    which: Literal["chosen", "rejected", "both", "random"],
    *,
    seed: int = 0,
) -> Sequence[PromptResponseRecord]:
    """Responses of pairs: one side, both (chosen before rejected), or one at random.

    One side of records that stay on disk stays there, too.

    Args:
      records: pairs.
      which: "random" takes either with probability 1/2, as in the paper for SCIT; "both" as in the
        paper for Dual.
      seed: of "random".
    """
    if isinstance(records, IndexedRecords) and which in ("chosen", "rejected"):
        return records.map(partial(response_of, side=which))
    coin = np.random.default_rng([seed, 0x5C17]).random(len(records)) < 0.5
    sides: dict[str, Callable[[int], tuple[Side, ...]]] = {
        "chosen": lambda _: ("chosen",),
        "rejected": lambda _: ("rejected",),
        "both": lambda _: ("chosen", "rejected"),
        "random": lambda at: ("chosen",) if coin[at] else ("rejected",),
    }
    return [
        response_of(record, side) for at, record in enumerate(records) for side in sides[which](at)
    ]


def contrastive_pairs(
    records: Sequence[PreferenceRecord], how: Tokenization, instructions: Instructions
) -> tuple[TokenizedPairs, StimulusReport]:
    """Rows for contrastive instruction tuning: a response under its own and the other instruction.

    The chosen response matches the positive instruction, the rejected one the negative; the first
    row of each new pair is the matching one.

    Args:
      records: pairs; each gives two new pairs.
      how: tokenizer and format.
      instructions: the two instructions.

    Raises:
      UserError: no response is left.

    References:
      Liu et al., 2024, arXiv:2312.15997 (RAHF-SCIT).
    """
    both = responses_of(records, "both")
    stimuli = tokenize_stimuli(both, how, (instructions.positive, instructions.negative))
    rows, prompts, numbers = [], [], []
    for at, response in enumerate(stimuli.streams[0].record_index):
        for stream in stimuli.streams if response % 2 == 0 else stimuli.streams[::-1]:
            rows.append(stream[at])
            prompts.append(stream.prompt_length[at])
            numbers.append(response // 2)
    pairs = joined_rows(rows, np.asarray(prompts), np.asarray(numbers))
    return TokenizedPairs(rows=pairs), stimuli.report


def hindsight_rows(
    records: Sequence[PreferenceRecord], how: Tokenization, instructions: Instructions
) -> tuple[TokenizedRows, StimulusReport]:
    """Rows for hindsight instruction relabelling: each response under the instruction it follows.

    Args:
      records: pairs; each gives two rows.
      how: tokenizer and format.
      instructions: the positive instruction for chosen, the negative for rejected responses.

    Raises:
      UserError: no response is left.

    References:
      Zhang et al., 2023, arXiv:2302.05206; as a baseline in arXiv:2312.15997.
    """
    both = responses_of(records, "both")
    stimuli = tokenize_stimuli(both, how, (instructions.positive, instructions.negative))
    numbers = stimuli.streams[0].record_index

    def own() -> Iterator[tuple[np.ndarray, int]]:
        for at, response in enumerate(numbers):
            stream = stimuli.streams[int(response) % 2]
            yield stream[at], int(stream.prompt_length[at])

    rows, prompts = zip(*own(), strict=True)
    return joined_rows(rows, np.asarray(prompts), numbers // 2), stimuli.report
