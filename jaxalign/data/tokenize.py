"""Text to tokens: exact prompt/response boundaries, chat templates, and counted truncation."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from jaxalign.data.plain_prompts import Chat, ends_responses
from jaxalign.data.reading import BadRecords
from jaxalign.data.record_text import RecordText, Spans, Turns, text_of
from jaxalign.data.records import (
    PreferenceRecord,
    PromptRecord,
    PromptResponseRecord,
    TextRecord,
)
from jaxalign.data.tokenized import (
    RowWriter,
    TokenizedPairs,
    TokenizedRows,
    TokenizedTexts,
    TokenizeReport,
)
from jaxalign.data.tokenizers import Encoder, Tokenizer
from jaxalign.errors import RecordError, UserError
from jaxalign.files import read_arrays, write_arrays

T = TypeVar("T")

CHUNK = 2048  # texts per call of the tokenizer: bounds the memory of offsets


def tokenize_pairs(
    records: Iterable[PreferenceRecord],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    min_prompt_length: int | None = None,
    prompt_format: str = "{prompt}",
    chat_template: str | None = None,
    chat: Chat = "auto",
    end_token: bool | None = None,
    encoder_decoder: bool = False,
    bad_records: BadRecords = "error",
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
      end_token: whether the end-of-sequence token follows a response; None: unless an export says
        that its model was trained without it.
      encoder_decoder: the prompt is the encoder's text (with the tokenizer's end token) and the
        response is a text of its own; no joint text exists.
      bad_records: "error" stops at a record of which no text can be made, as when the template
        refuses it; "skip" counts it.
      may_be_empty: whether no pair may be left.

    Returns:
      The pairs, those with the same tokens on both sides left out, and the counts.
    """
    report = TokenizeReport()
    in_text = text_of(tokenizer, prompt_format, chat_template, chat)
    ends = ends_responses(tokenizer) if end_token is None else end_token
    encoder = Encoder(tokenizer, end_token=ends)

    def sides(record: PreferenceRecord, place: str) -> list[_Side]:
        texts = in_text(record.prompt, (record.chosen, record.rejected), place)
        return _sides(texts, report, encoder_decoder, place)

    rows, usable = RowWriter(), _Usable(records, sides, report, bad_records)
    pairs = _encoded(usable, encoder, report, encoder_decoder, alike=2)
    for number, (chosen, rejected) in enumerate(zip(pairs, pairs, strict=True)):
        index = usable.numbers[number]
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
    report.note(in_text)
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
    end_token: bool | None = None,
    encoder_decoder: bool = False,
    turns: Turns = "last",
    bad_records: BadRecords = "error",
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
      end_token: whether the end-of-sequence token follows a response; None: unless an export says
        that its model was trained without it.
      encoder_decoder: prompt and response are texts of their own.
      turns: "last": the responses are scored; "all": all turns of the assistant are, those in the
        prompt, too.
      bad_records: as for `tokenize_pairs`.
      may_be_empty: whether there may be no record.
    """
    report = TokenizeReport()
    in_text = text_of(tokenizer, prompt_format, chat_template, chat)
    ends = ends_responses(tokenizer) if end_token is None else end_token
    encoder = Encoder(tokenizer, end_token=ends)

    def sides(record: PromptResponseRecord, place: str) -> list[_Side]:
        texts = in_text(record.prompt, (record.response,), place, turns=turns)
        return _sides(texts, report, encoder_decoder, place)

    rows, usable = RowWriter(), _Usable(records, sides, report, bad_records)
    for number, encoded in enumerate(_encoded(usable, encoder, report, encoder_decoder)):
        report.records += 1
        [row] = _truncate([encoded], max_length, min_prompt_length, encoder, report)
        rows.add(*row, usable.numbers[number])
    report.tokens = rows.tokens
    report.note(in_text)
    if not len(rows) and not may_be_empty:
        raise UserError(f"no records to tokenise: {report.summary()}")
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
    rows = RowWriter()
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
    report.note(in_text)
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
    report, rows = TokenizeReport(), RowWriter()
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
    report.note(in_text)
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


class _Usable:
    """The prompts and responses of the records of which texts can be made.

    Args:
      records: all of them.
      sides: of a record at a place; raises `RecordError` if no text can be made of it.
      report: where those that are skipped are counted.
      bad_records: "error" or "skip".
    """

    def __init__(
        self,
        records: Iterable[Any],
        sides: Callable[[Any, str], list[_Side]],
        report: TokenizeReport,
        bad_records: BadRecords,
    ):
        self._records, self._sides, self._report = records, sides, report
        self._skip = bad_records == "skip"
        self.numbers: list[int] = []
        """Numbers of the usable records so far, from 0."""

    def __iter__(self) -> Iterator[_Side]:
        for number, record in enumerate(self._records):
            try:
                sides = self._sides(record, f"{record.source}:{record.line}")
            except RecordError as error:
                if not self._skip:
                    raise
                self._report.records += 1
                self._report.refused += 1
                self._report.refusals = self._report.refusals or [str(error)]
                continue
            self.numbers.append(number)
            yield from sides


def _sides(
    texts: RecordText, report: TokenizeReport, encoder_decoder: bool, place: str
) -> list[_Side]:
    """The prompt with each response of a record, which are counted."""
    if encoder_decoder and any(spans is not None for spans in texts.spans):
        raise UserError(
            f"{place}: a response of several turns needs a decoder; for an encoder-decoder, "
            "move all turns but the last into the prompt"
        )
    report.template_differs += len(texts.responses) * texts.differs
    report.user_turns += sum(spans is not None for spans in texts.spans)
    return [
        (texts.prompt, response, spans)
        for response, spans in zip(texts.responses, texts.spans, strict=True)
    ]


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
