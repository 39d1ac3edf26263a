"""Text to tokens: exact prompt/response boundaries, chat templates, and counted truncation."""

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import ClassVar, TypeAlias, TypeVar

import numpy as np

from jaxalign.data.plain_prompts import Chat
from jaxalign.data.record_text import RecordText, Spans, TextOf, Turns, text_of
from jaxalign.data.records import (
    PreferenceRecord,
    PromptRecord,
    PromptResponseRecord,
    TextRecord,
)
from jaxalign.data.tokenizers import Encoder, Tokenizer
from jaxalign.errors import UserError
from jaxalign.files import read_arrays, write_arrays

T = TypeVar("T")

CHUNK = 2048  # texts per call of the tokenizer: bounds the memory of offsets


# ------------------------------------------------------------------------ tokenized records


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
    tokens: int = 0
    """Tokens kept."""
    notes: list[str] = field(default_factory=list)
    """Fields that the chat template ignores, and variables that it reads but nothing sets."""
    chat: list[str] = field(default_factory=list)
    """How plain prompts were rendered, if a rule decided it."""
    prompts_as_chat: int = 0
    """Plain prompts that went through the chat template, as a user's turn."""

    def summary(self) -> str:
        """One line for the log."""
        parts = [f"{self.records} records, {self.tokens} tokens"]
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
                parts.append(f"{name.replace('_', ' ')}: {count}")
        return "; ".join(parts + self.notes)

    def add(self, other: "TokenizeReport") -> None:
        """Add the counts and notes of more records."""
        for name, found in vars(other).items():
            own = getattr(self, name)
            joined = sorted({*own, *found}) if isinstance(found, list) else own + found
            setattr(self, name, joined)

    def _note(self, in_text: TextOf) -> None:
        self.notes, self.chat = in_text.notes(), in_text.plain_prompt_notes()
        self.prompts_as_chat = in_text.plain_seen[True]


# ------------------------------------------------------------------------------ tokenisation


def tokenize_pairs(
    records: Iterable[PreferenceRecord],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    min_prompt_length: int | None = None,
    prompt_format: str = "{prompt}",
    chat_template: str | None = None,
    chat: Chat = "auto",
    end_token: bool = True,
    encoder_decoder: bool = False,
    may_be_empty: bool = False,
) -> tuple[TokenizedPairs, TokenizeReport]:
    r"""Tokens of preference pairs, with the boundary between prompt and response exact.

    The response's tokens are those of the joint text, from the first token whose characters lie in
    the response. Where one token of the joint text holds characters of both, prompt and
    response are tokenised apart (so that the prompt's tokens are those that a sampler would see)
    and the row is counted. The end-of-sequence token follows every response that is not cut; a
    beginning token stands where the tokenizer puts one, once.

    Of responses of several turns, the tokens that the assistant wrote are scored, and the turns
    between are read; those that both sides of a pair begin with are part of the prompt.

    Both responses of a pair keep the same end of the prompt: with chosen and rejected of at most
    r tokens it keeps its last max(max_length - r, min_prompt_length); a response is cut at its
    end where the room left is not enough.

    Args:
      records: pairs.
      tokenizer: from `load_tokenizer`.
      max_length: most tokens of prompt and response together.
      min_prompt_length: tokens of the prompt that long responses do not displace; by default
        half of `max_length`.
      prompt_format: text around a plain prompt, e.g. "Question: {prompt}\nAnswer:".
      chat_template: in place of the tokenizer's own, for conversations.
      chat: whether plain prompts also go through the chat template; see `plain_prompts`.
      end_token: whether the end-of-sequence token follows a response.
      encoder_decoder: the prompt is the encoder's text (with the tokenizer's end token) and the
        response is a text of its own; no joint text exists.
      may_be_empty: whether no pair may be left.

    Returns:
      The pairs, those with the same tokens on both sides left out, and the counts.
    """
    report = TokenizeReport()
    in_text = text_of(tokenizer, prompt_format, chat_template, chat)
    encoder = Encoder(tokenizer, end_token=end_token)

    def sides() -> Iterator[_Side]:
        for record in records:
            place = f"{record.source}:{record.line}"
            texts = in_text(record.prompt, (record.chosen, record.rejected), place)
            yield from _sides(texts, report, encoder_decoder, place)

    rows = _RowWriter()
    pairs = _encoded(sides(), encoder, report, encoder_decoder, alike=2)
    for index, (chosen, rejected) in enumerate(zip(pairs, pairs, strict=True)):
        report.records += 1
        cut = _truncate([chosen, rejected], max_length, min_prompt_length, encoder, report)
        if any(mask is not None and not response for _, response, mask in cut):
            report.unscored += 1
            continue
        if cut[0][:2] == cut[1][:2]:
            report.identical += 1
            continue
        for row in cut:
            rows.add(*row, index)
    report.tokens = rows.tokens
    report._note(in_text)
    if not len(rows) and not may_be_empty:
        raise UserError(f"no pair is left of {report.records}: {report.summary()}")
    return TokenizedPairs(rows=rows.finish()), report


def tokenize_responses(
    records: Iterable[PromptResponseRecord],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    min_prompt_length: int | None = None,
    prompt_format: str = "{prompt}",
    chat_template: str | None = None,
    chat: Chat = "auto",
    end_token: bool = True,
    encoder_decoder: bool = False,
    turns: Turns = "last",
    may_be_empty: bool = False,
) -> tuple[TokenizedRows, TokenizeReport]:
    """Tokens of prompts and responses; as `tokenize_pairs`, one response each.

    Args:
      records: prompts and responses.
      tokenizer: from `load_tokenizer`.
      max_length: most tokens of prompt and response together.
      min_prompt_length: tokens of the prompt that a long response does not displace.
      prompt_format: text around a plain prompt.
      chat_template: in place of the tokenizer's own, for conversations.
      chat: whether plain prompts also go through the chat template; see `plain_prompts`.
      end_token: whether the end-of-sequence token follows a response.
      encoder_decoder: prompt and response are texts of their own.
      turns: "last": the responses are scored; "all": all turns of the assistant are, those in the
        prompt, too.
      may_be_empty: whether there may be no record.
    """
    report = TokenizeReport()
    in_text = text_of(tokenizer, prompt_format, chat_template, chat)
    encoder = Encoder(tokenizer, end_token=end_token)

    def texts() -> Iterator[_Side]:
        for record in records:
            place = f"{record.source}:{record.line}"
            texts = in_text(record.prompt, (record.response,), place, turns=turns)
            yield from _sides(texts, report, encoder_decoder, place)

    rows = _RowWriter()
    for index, encoded in enumerate(_encoded(texts(), encoder, report, encoder_decoder)):
        report.records += 1
        [row] = _truncate([encoded], max_length, min_prompt_length, encoder, report)
        rows.add(*row, index)
    report.tokens = rows.tokens
    report._note(in_text)
    if not len(rows) and not may_be_empty:
        raise UserError("no records to tokenise")
    return rows.finish(), report


def tokenize_prompts(
    records: Iterable[PromptRecord],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    prompt_format: str = "{prompt}",
    chat_template: str | None = None,
    chat: Chat = "auto",
    encoder_decoder: bool = False,
) -> tuple[TokenizedRows, TokenizeReport]:
    """Tokens of prompts that responses will be sampled for, with the beginning of training rows.

    Args:
      records: prompts.
      tokenizer: from `load_tokenizer`.
      max_length: most tokens of a prompt; longer ones lose their beginning and are counted.
      prompt_format: text around a plain prompt.
      chat_template: in place of the tokenizer's own, for conversations.
      chat: whether plain prompts also go through the chat template; see `plain_prompts`.
      encoder_decoder: prompts are the encoder's texts, with the tokenizer's end token.

    Returns:
      Rows that are all prompt, and the counts.
    """
    report = TokenizeReport()
    in_text = text_of(tokenizer, prompt_format, chat_template, chat)
    encoder = Encoder(tokenizer)
    if max_length < 1 + len(encoder.start) + len(encoder.suffix):
        raise UserError(f"max_prompt_length: {max_length} leaves no room for a prompt")
    rows = _RowWriter()
    texts = (in_text.prompt(record.prompt, f"{record.source}:{record.line}") for record in records)
    for chunk in _chunks(texts, CHUNK):
        for encoding in encoder.encode(chunk):
            ends = encoder.suffix if encoder_decoder else []
            prompt = (encoder.begun(list(encoding.ids)) or encoder.start) + ends
            if len(prompt) > max_length:
                report.truncated_prompts += 1
                begin = prompt[: len(encoder.prefix)]
                prompt = begin + prompt[len(prompt) - max_length + len(begin) :]
            rows.add(prompt, [], None, report.records)
            report.records += 1
    report.tokens = rows.tokens
    report._note(in_text)
    if not len(rows):
        raise UserError("no prompts to tokenise")
    return rows.finish(), report


def tokenize_conversations(
    records: Iterable[PromptResponseRecord], tokenizer: Tokenizer, *, max_length: int
) -> tuple[TokenizedRows, TokenizeReport]:
    """Tokens of conversations exactly as their chat template renders them.

    What transformers' `apply_chat_template` gives; plain prompts and responses are turns.

    Args:
      records: prompts and responses.
      tokenizer: from `load_tokenizer`.
      max_length: most tokens of a conversation; longer ones lose their beginning.

    Returns:
      Rows whose prompt is all but the last token, and the counts.
    """
    report, rows = TokenizeReport(), _RowWriter()
    in_text = text_of(tokenizer, "{prompt}", None, "always")
    encoder = Encoder(tokenizer)
    texts = (
        in_text.whole(record.prompt, record.response, f"{record.source}:{record.line}")
        for record in records
    )
    for chunk in _chunks(texts, CHUNK):
        for encoding in encoder.encode(chunk):
            ids = list(encoding.ids)
            if len(ids) > max_length:
                report.truncated_prompts += 1
                begin = encoder.prefix if ids[: len(encoder.prefix)] == encoder.prefix else []
                ids = begin + ids[len(ids) - max_length + len(begin) :]
            rows.add(ids[:-1], ids[-1:], None, report.records)
            report.records += 1
    report.tokens = rows.tokens
    report._note(in_text)
    if not len(rows):
        raise UserError("no records to tokenise")
    return rows.finish(), report


def tokenize_texts(
    texts: Iterable[str | TextRecord], tokenizer: Tokenizer, *, cache: Path | None = None
) -> TokenizedTexts:
    """Documents as tokens, each with the tokenizer's beginning and end tokens.

    Args:
      texts: documents.
      tokenizer: from `load_tokenizer`.
      cache: a folder; tokens are kept there under a hash of texts and tokenizer, and read again.
    """
    encoder = Encoder(tokenizer)
    plain = (text.text if isinstance(text, TextRecord) else text for text in texts)
    if cache is None:
        return _tokenize_texts(plain, encoder)
    documents = list(plain)
    path = cache / f"{_fingerprint(documents, encoder)}.npz"
    stored = read_arrays(path, ("flat", "offsets", "characters"))
    if stored is not None:
        return TokenizedTexts(
            flat=stored["flat"], offsets=stored["offsets"], characters=int(stored["characters"])
        )
    tokenized = _tokenize_texts(documents, encoder)
    cache.mkdir(parents=True, exist_ok=True)
    write_arrays(
        path,
        flat=tokenized.flat,
        offsets=tokenized.offsets,
        characters=np.asarray(tokenized.characters),
    )
    return tokenized


def _tokenize_texts(texts: Iterable[str], encoder: Encoder) -> TokenizedTexts:
    flat: list[np.ndarray] = []
    lengths: list[int] = []
    characters = 0
    for chunk in _chunks(texts, 256):
        characters += sum(map(len, chunk))
        for encoding in encoder.backend.encode_batch_fast(chunk, add_special_tokens=False):
            ids = encoding.ids
            if ids[: len(encoder.start)] != encoder.start:
                ids = encoder.start + ids
            flat.append(np.asarray(encoder.ended(ids), np.int32))
            lengths.append(len(flat[-1]))
    if not flat:
        raise UserError("no texts to tokenise")
    return TokenizedTexts(
        flat=np.concatenate(flat),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        characters=characters,
    )


def _fingerprint(texts: Sequence[str], encoder: Encoder) -> str:
    import hashlib

    digest = hashlib.sha256(encoder.backend.to_str().encode("utf-8"))
    digest.update(json.dumps([encoder.start, encoder.eos]).encode("utf-8"))
    for text in texts:
        content = text.encode("utf-8")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()[:32]


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


_Side: TypeAlias = tuple[str, str, Spans | None]
"""A prompt, a response, and the parts of the response that are scored; None: all of it."""
_Row: TypeAlias = tuple[list[int], list[int], list[bool] | None]
"""Tokens of a prompt and a response, and which of the response are scored; None: all of them."""


def _sides(
    texts: RecordText, report: TokenizeReport, encoder_decoder: bool, place: str
) -> Iterator[_Side]:
    """The prompt with each response of a record, which are counted."""
    report.template_differs += len(texts.responses) * texts.differs
    report.user_turns += sum(spans is not None for spans in texts.spans)
    for response, spans in zip(texts.responses, texts.spans, strict=True):
        if spans is not None and encoder_decoder:
            raise UserError(
                f"{place}: a response of several turns needs a decoder; for an encoder-decoder, "
                "move all turns but the last into the prompt"
            )
        yield texts.prompt, response, spans


def _encoded(
    texts: Iterable[_Side],
    encoder: Encoder,
    report: TokenizeReport,
    apart: bool,
    alike: int = 1,
) -> Iterator[_Row]:
    """Prompt and response tokens with the tokens that begin and end a text."""
    for chunk in _chunks(texts, CHUNK):
        if apart:
            prompts = encoder.encode([prompt for prompt, _, _ in chunk])
            responses = encoder.encode([response for _, response, _ in chunk])
            for prompt, response in zip(prompts, responses, strict=True):
                begun = encoder.begun(list(prompt.ids)) + encoder.suffix
                yield begun or encoder.start, encoder.ended(list(response.ids)), None
        else:
            joint = encoder.joint([side[:2] for side in chunk], alike=alike)
            for (_, _, spans), (prompt, response, straddled) in zip(chunk, joint, strict=True):
                report.straddling += straddled
                ids, mask = encoder.ended(response.ids), None
                if spans is not None:
                    mask = response.within(spans)
                    mask += [True] * (len(ids) - len(mask))  # an end-of-sequence token
                yield encoder.begun(prompt) or encoder.start, ids, mask


def _truncate(
    responses: Sequence[_Row],
    max_length: int,
    min_prompt_length: int | None,
    encoder: Encoder,
    report: TokenizeReport,
) -> list[_Row]:
    """Cut prompts at their beginning and responses at their end until all fit.

    Tokens after the last that is scored are cut, too, which may leave nothing of a response.
    """
    floor = max_length // 2 if min_prompt_length is None else min_prompt_length
    if max_length < 2 or not 0 < floor < max_length:
        raise UserError(
            f"max_length: {max_length} leaves no room for a prompt of {floor or 1} and a response"
        )
    longest = max(len(response) for _, response, _ in responses)
    room = max(max_length - longest, floor)
    cut: list[_Row] = []
    for whole, response, mask in responses:
        prompt = whole
        if len(whole) + longest > max_length and len(whole) > room:
            report.truncated_prompts += 1
            begin = encoder.prefix if len(encoder.prefix) < room else []
            begin = begin if whole[: len(begin)] == begin else []
            prompt = begin + whole[len(whole) - room + len(begin) :]
        left = max_length - len(prompt)
        report.truncated_responses += len(response) > left
        if mask is not None:
            left = 1 + max(np.flatnonzero(mask[:left]), default=-1)
        cut.append((prompt, response[:left], mask and mask[:left]))
    return cut


class _RowWriter:
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
