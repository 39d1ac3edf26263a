"""What policies wrote: files of prompts and responses, matched with one another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from jaxalign.data.forms import COLUMNS, fields_of, preference_of_row, text_or_turns
from jaxalign.data.reading import BadRecordError, BadRecords, Row
from jaxalign.data.records import transcript
from jaxalign.data.sources import read_records
from jaxalign.errors import UserError

PROMPT = ("prompt", "instruction")
RESPONSE = ("response", "completion", "output")


@dataclass(frozen=True, kw_only=True)
class Output:
    """One row of a file."""

    key: str | None
    """Its id."""
    prompt: str
    response: str
    place: str


@dataclass(frozen=True, kw_only=True)
class Matched:
    """Prompts that every file has, and each file's responses to them."""

    prompts: Sequence[str]
    places: Sequence[str]
    """Of the prompts in the first file."""
    responses: Mapping[str, Sequence[Sequence[str]]]
    """Policy -> files (seeds) -> responses in the order of `prompts`."""
    left_out: int
    """Prompts that some file lacks."""


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A comparison that people have judged."""

    prompt: str
    first: str
    second: str
    label: float
    """1 where the first is better, 0 the second, 0.5 neither."""
    group: str
    place: str


def read_outputs(source: str, bad_records: BadRecords = "error") -> list[Output]:
    """The rows of a file: {prompt, response}, or {instruction, output} as AlpacaEval writes them.

    Args:
      source: as for `preference_records`.
      bad_records: "error" or "skip".

    Raises:
      UserError: names file and line of the first row that cannot be used.
    """

    def output(row: Row) -> list[Output]:
        fields = fields_of(row)
        key = fields.get("id")
        return [
            Output(
                key=None if key is None else str(key),
                prompt=_text(fields, PROMPT),
                response=_text(fields, RESPONSE),
                place=row.place,
            )
        ]

    columns = ("id", *PROMPT, *RESPONSE)
    return list(read_records(source, output, bad_records, columns=columns))


def _text(fields: Mapping[str, Any], names: Sequence[str]) -> str:
    for name in names:
        value = fields.get(name)
        if value is not None:
            return transcript(text_or_turns(value, name))
    there = ", ".join(map(str, fields)) or "none"
    raise BadRecordError("missing field", f"no {' or '.join(names)}; its fields are {there}")


def match(
    files: Mapping[str, Sequence[str]],
    *,
    common: bool = False,
    most: int | None = None,
    bad_records: BadRecords = "error",
) -> Matched:
    """The same prompts in every file, by id where all rows have one, else by their text.

    Args:
      files: policy -> its files, one per seed.
      common: leave out prompts that some file lacks, instead of refusing.
      most: prompts to take, from the first on; None: all.
      bad_records: "error" or "skip".

    Raises:
      UserError: a prompt that comes twice or is missing, with file and line.
    """
    read = {source: read_outputs(source, bad_records) for some in files.values() for source in some}
    by_id = all(row.key is not None for rows in read.values() for row in rows)
    tables = {source: _table(rows, by_id) for source, rows in read.items()}
    first, *others = tables
    kept = dict(tables[first])
    for other in others:
        for here, there in ((first, other), (other, first)):
            missing = [row for key, row in tables[here].items() if key not in tables[there]]
            if missing and not common:
                what = f"id {missing[0].key}" if by_id else "this prompt"
                raise UserError(
                    f"{missing[0].place}: {there} has no row with {what} "
                    f"({len(missing)} of {len(tables[here])} missing there); add --common to "
                    "compare what all files have"
                )
        kept = {key: row for key, row in kept.items() if key in tables[other]}
        for key, row in kept.items():
            if row.prompt != tables[other][key].prompt:
                raise UserError(
                    f"{tables[other][key].place}: id {key} has another prompt than at {row.place}"
                )
    if not kept:
        raise UserError(f"{', '.join(tables)}: no prompt in common")
    every = {key for table in tables.values() for key in table}
    keys = list(kept)[:most]
    return Matched(
        prompts=[kept[key].prompt for key in keys],
        places=[kept[key].place for key in keys],
        responses={
            name: [[tables[source][key].response for key in keys] for source in some]
            for name, some in files.items()
        },
        left_out=len(every) - len(kept),
    )


def _table(rows: Sequence[Output], by_id: bool) -> dict[str, Output]:
    table: dict[str, Output] = {}
    for row in rows:
        key = str(row.key) if by_id else row.prompt
        if key in table:
            what = f"id {key} comes twice" if by_id else "the same prompt comes twice; give ids"
            raise UserError(f"{row.place}: {what}, first at {table[key].place}")
        table[key] = row
    return table


def read_labelled(
    source: str, by: str | None, most: int | None = None, bad_records: BadRecords = "error"
) -> list[Labelled]:
    """Comparisons with people's verdicts.

    Args:
      source: preference pairs in any form that training reads, of which the chosen response is
        the better one; or rows {prompt, first, second, preference} with 1, 0 or 0.5.
      by: field whose values part the table.
      most: rows to take, from the first on; None: all.
      bad_records: "error" or "skip".

    Raises:
      UserError: names file and line of the first row that cannot be used.
    """

    def labelled(row: Row) -> list[Labelled]:
        fields = fields_of(row)
        if by is not None and fields.get(by) is None:
            there = ", ".join(map(str, fields))
            raise BadRecordError("missing field", f"no {by}; its fields are {there}")
        if fields.get("preference") is not None:
            label = fields["preference"]
            if isinstance(label, bool) or label not in (0, 0.5, 1):
                raise BadRecordError("wrong type", f"preference is {label!r}, not 1, 0 or 0.5")
            prompt, first, second = (
                _text(fields, names) for names in (PROMPT, ("first",), ("second",))
            )
        else:
            pair, label = preference_of_row(row), 1.0
            prompt, first, second = map(transcript, (pair.prompt, pair.chosen, pair.rejected))
        return [
            Labelled(
                prompt=prompt,
                first=first,
                second=second,
                label=float(label),
                group="" if by is None else f"{by} {fields[by]}",
                place=row.place,
            )
        ]

    columns = (*COLUMNS, "preference", "first", "second", *PROMPT, *([by] if by else []))
    return list(islice(read_records(source, labelled, bad_records, columns=columns), most))
