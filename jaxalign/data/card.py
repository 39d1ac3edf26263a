"""The data card of a source: what a run would see of it, in numbers."""

import functools
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64, Int

from jaxalign.data.batches import common_lengths, epoch_positions
from jaxalign.data.duplicates import near_duplicates, token_overlap
from jaxalign.data.forms import COLUMNS, fields_of
from jaxalign.data.mixtures import Mixture, WeightedSource
from jaxalign.data.packing import Packing, packed_positions
from jaxalign.data.plain_prompts import Chat
from jaxalign.data.reading import BadRecordError, BadRecords, ReadReport, nothing_usable, refuse
from jaxalign.data.record_text import Turns
from jaxalign.data.records import (
    NOT_RESPONDING,
    PreferenceRecord,
    PromptResponseRecord,
    Text,
    UnpairedRecord,
    tools_of,
    transcript,
)
from jaxalign.data.sources import (
    preference_records,
    read_rows,
    response_records,
    unpaired_records,
)
from jaxalign.data.tokenize import tokenize_pairs, tokenize_responses
from jaxalign.data.tokenized import TokenizedExamples, TokenizedResponses, TokenizeReport
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.errors import UserError

Kind = Literal["pairs", "responses", "labelled"]
"""Preference pairs, responses to imitate, or responses with labels."""
Record = PreferenceRecord | PromptResponseRecord | UnpairedRecord
SIDES = {"pairs": ("chosen", "rejected"), "responses": ("response",), "labelled": ("response",)}
READERS: dict[Kind, Any] = {
    "pairs": preference_records,
    "responses": response_records,
    "labelled": unpaired_records,
}
WHOLE = 2**30
"""A length above that of all rows."""
ALIKE = 0.9
"""Overlap of tokens from which the two responses of a pair are nearly the same."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
JOINT = 0.75
"""Largest size of a row with a shared prompt, as a fraction of two rows; as `share_prompts`."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How records are read and tokenised."""

    tokenizer: Tokenizer
    max_length: int
    batch_size: int
    prompt_format: str = "{prompt}"
    chat: Chat = "auto"
    turns: Turns = "last"
    """Of responses to imitate."""
    end_token: bool = True
    """Whether the end-of-sequence token follows responses."""
    threshold: float | None = None
    """Smallest number that is a desirable label; None: labels are true or false, 1 or 0."""
    bad_records: BadRecords = "skip"
    max_records: int | None = None
    """Largest number of records, counted from the first; None: all."""
    examples: int = 3
    """Number of examples."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Numbers of tokens."""

    mean: float
    least: int
    quantiles: tuple[int, ...]
    """At 5, 25, 50, 75 and 95 percent."""
    largest: int


@dataclass(frozen=True, kw_only=True)
class Positions:
    """What the network computes for an example in batches of some form, on average."""

    tokens: float
    """Tokens; of rows with shared beginnings, these once."""
    positions: float
    """Tokens and padding."""

    @property
    def padding(self) -> float:
        """Fraction of the positions that are padding."""
        return 1 - self.tokens / self.positions


@dataclass(frozen=True, kw_only=True)
class ShownRow:
    """A prompt with a response as a run reads it."""

    name: str
    """Of the side, and the source's file and line."""
    parts: tuple[tuple[str, bool], ...]
    """Text of neighbouring tokens, and whether they are scored."""


@dataclass(frozen=True, kw_only=True)
class DataCard:
    """What a run would see of a source; None where the kind of records has no such number."""

    label: str
    source: str
    weight: float
    kind: Kind
    read: int
    """Rows."""
    kept: int
    """Rows that can be used."""
    skipped: dict[str, int]
    """The others, by reason."""
    first_skipped: dict[str, str]
    """File and line of the first of each reason."""
    records: int
    """Records that the other numbers are of: of those kept, the first `max_records`."""
    forms: dict[str, int]
    """Records by form: plain text or conversations, and what these have."""
    lengths: dict[str, Lengths]
    """Tokens before truncation: of prompts, and of the responses of each side."""
    longer_than_max_length: int
    """Records with a row longer than `max_length`."""
    truncated_prompts: int
    """Rows whose prompt loses its beginning."""
    truncated_responses: int
    """Rows whose response loses its end."""
    left_out: int
    """Pairs left out after truncation: the same tokens on both sides, or nothing that is scored."""
    refused: int
    """Records left out because the chat template refuses them."""
    examples: int
    """Examples of an epoch of the source alone."""
    tokens: int
    """Tokens of these."""
    repeated_records: int
    """Records that are the same as an earlier one."""
    distinct_prompts: int
    near_duplicate_prompts: int
    """Distinct prompts with nearly the same words as an earlier one (`near_duplicates`)."""
    prompts_elsewhere: int | None
    """Distinct prompts that another source has, too; None: there is no other."""
    alike: int | None
    """Pairs whose responses have an overlap of at least 0.9 (`token_overlap`)."""
    common_beginning: float | None
    """Fraction of a pair's tokens that are the common beginning of its rows, mean of all pairs."""
    longer_chosen: float | None
    """Fraction of pairs whose chosen response has more tokens."""
    equal_lengths: float | None
    """Fraction of pairs whose responses have equally many."""
    desirable: float | None
    """Fraction of labels that are true."""
    positions: dict[str, Positions]
    """What the network computes for an example, by form of the batches."""
    scripts: dict[str, float]
    """Fraction of letters by Unicode script, the most frequent first."""
    chat: list[str]
    """How plain prompts are rendered, if a rule decides it."""
    notes: list[str]
    """What the chat template does not read, or lacks."""
    used_an_epoch: int | None = None
    """Examples of an epoch of the mixture; None: there is one source."""
    arrays: "Arrays" = field(repr=False)
    shown: list[tuple[str, list[ShownRow]]] = field(repr=False)
    """Examples: file and line, and the rows."""

    def numbers(self) -> dict[str, Any]:
        """The card as JSON values, without what is drawn and shown."""
        values = asdict(replace(self, arrays=NOTHING, shown=[]))
        return {name: value for name, value in values.items() if name not in ("arrays", "shown")}


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """Numbers of each record, which are drawn."""

    prompt: Int[np.ndarray, " records"]
    """Tokens of the prompt."""
    responses: dict[str, Int[np.ndarray, " records"]]
    """Tokens of the response of each side."""
    overlap: Float64[np.ndarray, " pairs"]
    """Overlap of the tokens of a pair's responses; empty for others."""


NOTHING = Arrays(prompt=np.zeros(0, int), responses={}, overlap=np.zeros(0))


def data_cards(
    sources: Sequence[WeightedSource], reading: Reading, kind: Kind | None = None
) -> list[DataCard]:
    """The cards of the sources of a mixture.

    Args:
      sources: of records.
      reading: how they are read.
      kind: of the records; None: of each source by its first rows.

    Raises:
      UserError: a source cannot be read, or none has the labels of a threshold.
    """
    records = []
    for one in sources:
        own, report = kind or kind_of(one.source), ReadReport()
        options = {"threshold": reading.threshold} if own == "labelled" else {}
        found = READERS[own](one.source, bad_records=reading.bad_records, report=report, **options)
        records.append((own, list(found)[: reading.max_records], report))
    if reading.threshold is not None and "labelled" not in {own for own, _, _ in records}:
        raise UserError("threshold: no source has labelled responses; leave it out")
    prompts = [
        {transcript(record.prompt) for record in own} if len(sources) > 1 else set()
        for _, own, _ in records
    ]
    cards = []
    for at, (one, (own, found, report)) in enumerate(zip(sources, records, strict=True)):
        elsewhere = None
        if len(sources) > 1:
            others = set().union(*(x for number, x in enumerate(prompts) if number != at))
            elsewhere = len(prompts[at] & others)
        cards.append(_card(one, own, found, report, elsewhere, reading))
    if len(sources) == 1:
        return cards
    mixture = Mixture(
        source=np.repeat(np.arange(len(cards)), [card.examples for card in cards]),
        weights=tuple(one.weight for one in sources),
    )
    return [
        replace(card, used_an_epoch=used)
        for card, (_, used) in zip(cards, mixture.sizes, strict=True)
    ]


def kind_of(source: str) -> Kind:
    """The kind of records of a source, by its first row with known fields.

    Raises:
      UserError: no row has them; the first fault if all rows have one.
    """
    if source == "embedded":
        return "pairs"
    report = ReadReport()
    for row in read_rows(source, COLUMNS):
        report.read += 1
        try:
            present = {name for name, value in fields_of(row).items() if value is not None}
        except BadRecordError as fault:
            refuse(row, fault, "skip", report)
            continue
        if {"chosen", "rejected"} <= present:
            return "pairs"
        if present & {"response", "completion"} and present & {"label", "score"}:
            return "labelled"
        if present & {"response", "completion", "messages"}:
            return "responses"
    if not report.kept:
        raise nothing_usable(source, report)
    raise UserError(
        f"{source}: no row with chosen and rejected, with a response, or with messages; see the "
        "guide on data formats"
    )


def _card(
    source: WeightedSource,
    kind: Kind,
    records: list[Record],
    report: ReadReport,
    elsewhere: int | None,
    reading: Reading,
) -> DataCard:
    if not records:
        raise UserError(f"{source.source}: no usable record")
    whole, counted = _tokens(records, kind, reading, WHOLE)
    names, longest = SIDES[kind], whole.length.max(1)
    begin = whole.rows.begin.reshape(-1, whole.sides)
    responses = {name: whole.length[:, side] - begin[:, side] for side, name in enumerate(names)}
    prompts, truncated = begin[:, 0], counted
    examples = whole
    if longest.max() > reading.max_length:
        examples, truncated = _tokens(records, kind, reading, reading.max_length)
    distinct = list(dict.fromkeys(transcript(record.prompt) for record in records))
    groups = near_duplicates(distinct)
    overlap = np.zeros(0)
    if kind == "pairs":
        overlap = np.array([_overlap(whole, at) for at in range(len(whole))])
    pairs = kind == "pairs"
    difference = whole.response_length[:, 0] - whole.response_length[:, -1]
    used = [records[int(number)] for number in whole.record_index]
    labels = [one.label for one in used if isinstance(one, UnpairedRecord)]
    identities = [_identity(record) for record in records]
    return DataCard(
        label=source.label,
        source=source.source,
        weight=source.weight,
        kind=kind,
        read=report.read or len(records),
        kept=report.kept or len(records),
        skipped=report.skipped,
        first_skipped=report.first,
        records=len(records),
        forms=_forms(records),
        lengths={"prompt": _lengths(prompts), **{n: _lengths(x) for n, x in responses.items()}},
        longer_than_max_length=int((longest > reading.max_length).sum()),
        truncated_prompts=truncated.truncated_prompts,
        truncated_responses=truncated.truncated_responses,
        left_out=truncated.identical + truncated.unscored,
        refused=truncated.refused,
        examples=len(examples),
        tokens=int(examples.length.sum()),
        repeated_records=len(identities) - len(set(identities)),
        distinct_prompts=len(distinct),
        near_duplicate_prompts=int((groups != np.arange(len(groups))).sum()),
        prompts_elsewhere=elsewhere,
        alike=int((overlap >= ALIKE).sum()) if pairs else None,
        common_beginning=float(np.mean(2 * common_lengths(whole) / whole.length.sum(1)))
        if pairs
        else None,
        longer_chosen=float((difference > 0).mean()) if pairs else None,
        equal_lengths=float((difference == 0).mean()) if pairs else None,
        desirable=float(np.mean(labels)) if labels else None,
        positions=_positions(examples, reading.batch_size),
        scripts=_scripts(records),
        chat=truncated.chat,
        notes=[*truncated.notes, *truncated.refusals],
        arrays=Arrays(prompt=prompts, responses=responses, overlap=overlap),
        shown=_shown(records, examples, kind, reading),
    )


def _tokens(
    records: list[Record], kind: Kind, reading: Reading, length: int
) -> tuple[TokenizedExamples, TokenizeReport]:
    """The examples that a run makes of the records, with at most so many tokens."""
    options: dict[str, Any] = {
        "max_length": length,
        "prompt_format": reading.prompt_format,
        "chat": reading.chat,
        "bad_records": reading.bad_records,
        "end_token": reading.end_token,
    }
    pairs = [record for record in records if isinstance(record, PreferenceRecord)]
    if kind == "pairs":
        return tokenize_pairs(pairs, reading.tokenizer, **options)
    responses = (
        PromptResponseRecord(
            prompt=one.prompt, response=one.completion, source=one.source, line=one.line
        )
        if isinstance(one, UnpairedRecord)
        else one
        for one in records
        if not isinstance(one, PreferenceRecord)
    )
    turns = reading.turns if kind == "responses" else "last"
    rows, report = tokenize_responses(responses, reading.tokenizer, turns=turns, **options)
    return TokenizedResponses(rows=rows), report


def _responses(record: Record) -> tuple[Text, ...]:
    match record:
        case PreferenceRecord():
            return record.chosen, record.rejected
        case PromptResponseRecord():
            return (record.response,)
        case UnpairedRecord():
            return (record.completion,)


def _identity(record: Record) -> str:
    """What two records that are the same have in common."""
    label = record.label if isinstance(record, UnpairedRecord) else None
    return json.dumps([record.prompt, *_responses(record), label], sort_keys=True)


def _forms(records: Sequence[Record]) -> dict[str, int]:
    """Number of records of each form that there is."""
    counts: Counter[str] = Counter()
    for record in records:
        prompt, responses = record.prompt, _responses(record)
        turns = [] if isinstance(prompt, str) else list(prompt)
        several = [list(x) for x in responses if not isinstance(x, str) and len(x) > 1]
        plain = isinstance(prompt, str) and all(isinstance(x, str) for x in responses)
        forms = {
            "plain text": plain,
            "conversations": not plain,
            "with a system turn": bool(turns) and turns[0]["role"] in ("system", "developer"),
            "with tools": bool(tools_of(prompt)),
            "with earlier turns of the assistant": any(
                turn["role"] not in NOT_RESPONDING for turn in turns
            ),
            "with a response of several turns": bool(several),
        }
        counts.update(name for name, has in forms.items() if has)
    return dict(counts)


def _lengths(tokens: Int[np.ndarray, " records"]) -> Lengths:
    return Lengths(
        mean=float(tokens.mean()),
        least=int(tokens.min()),
        quantiles=tuple(int(x) for x in np.quantile(tokens, QUANTILES, method="nearest")),
        largest=int(tokens.max()),
    )


def _positions(examples: TokenizedExamples, batch_size: int) -> dict[str, Positions]:
    """What the network computes for an example, padded and packed as in a run on one device."""
    order, number = {"batch_size": batch_size, "seed": 0}, len(examples)
    of_epoch = {"padded": epoch_positions(examples, **order)}
    if examples.sides > 1:
        of_epoch["padded, sharing prompts"] = epoch_positions(examples, joint_share=JOINT, **order)
    found = {
        name: Positions(tokens=tokens / number, positions=positions / number)
        for name, (tokens, positions) in of_epoch.items()
    }
    tokens, positions = packed_positions(examples, Packing(), **order)
    found["packed"] = Positions(tokens=tokens / batch_size, positions=positions / batch_size)
    return found


def _overlap(pairs: TokenizedExamples, at: int) -> float:
    """The overlap of the scored tokens of a pair."""
    rows = [pairs.rows[2 * at + side][pairs.rows.scored_in(2 * at + side)] for side in (0, 1)]
    return token_overlap(*(row.tolist() for row in rows))


def _shown(
    records: Sequence[Record], examples: TokenizedExamples, kind: Kind, reading: Reading
) -> list[tuple[str, list[ShownRow]]]:
    """Some examples, spread over all."""
    number, shown = min(reading.examples, len(examples)), []
    for at in (len(examples) * np.arange(number) // max(number, 1)).tolist():
        record = records[int(examples.record_index[at])]
        sides = [
            ShownRow(
                name=name,
                parts=marked_text(examples, examples.sides * at + side, reading.tokenizer),
            )
            for side, name in enumerate(SIDES[kind])
        ]
        shown.append((f"{record.source}:{record.line}", sides))
    return shown


def marked_text(
    examples: TokenizedExamples, row: int, tokenizer: Tokenizer
) -> tuple[tuple[str, bool], ...]:
    """The text of a row in parts: of each, whether its tokens are scored."""
    ids, scored = examples.rows[row], np.zeros(len(examples.rows[row]), bool)
    scored[examples.rows.scored_in(row)] = True
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(scored)) + 1)
    parts = []
    for run in runs:
        text: Any = tokenizer.decode(ids[run], clean_up_tokenization_spaces=False)
        parts.append((text, bool(scored[run[0]])))
    return tuple(parts)


def _scripts(records: Sequence[Record]) -> dict[str, float]:
    """Fraction of the letters of all texts by script."""
    characters: Counter[str] = Counter()
    for record in records:
        for text in (record.prompt, *_responses(record)):
            parts = [text] if isinstance(text, str) else [turn["content"] for turn in text]
            for part in parts:
                characters.update(part)
    counts: Counter[str] = Counter()
    for character, number in characters.items():
        if name := script_of(character):
            counts[name] += number
    total = max(1, counts.total())
    return {name: number / total for name, number in counts.most_common()}


@functools.cache
def script_of(character: str) -> str:
    """The script of a letter by the first word of its Unicode name; empty for other characters."""
    if not character.isalpha():
        return ""
    words = unicodedata.name(character, "other").split()
    first = words[1] if words[0] in ("FULLWIDTH", "HALFWIDTH") and words[1:] else words[0]
    return {"CJK": "Han"}.get(first, first.capitalize())
