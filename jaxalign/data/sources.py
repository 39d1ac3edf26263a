"""Sources of records: a file, a folder, `tfds:NAME`, a Hugging Face hub name or `embedded`."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from jaxalign.data.embedded import embedded_preferences, embedded_responses, embedded_texts
from jaxalign.data.forms import (
    COLUMNS,
    as_unpaired,
    preference_of_row,
    prompt_of_row,
    response_of_row,
    text_of_row,
    unpaired_of_row,
)
from jaxalign.data.reading import (
    FILES,
    BadRecordError,
    BadRecords,
    ReadReport,
    Row,
    nothing_usable,
    path_rows,
    refuse,
    split_name,
    suffix,
    unreadable,
)
from jaxalign.data.records import (
    PreferenceRecord,
    PromptRecord,
    PromptResponseRecord,
    TextRecord,
    UnpairedRecord,
)
from jaxalign.errors import UserError, notice

R = TypeVar("R")
P = TypeVar("P", PreferenceRecord, PromptRecord, PromptResponseRecord, UnpairedRecord, TextRecord)


@dataclass(frozen=True, kw_only=True)
class RecordKind(Generic[R]):
    """A kind of record: how it is made of rows."""

    of_row: Callable[[Row], list[R]]
    """The records of a row; raises a `BadRecordError`. It can be pickled."""
    embedded: Callable[[], Iterable[R]]
    """Those of the source "embedded"."""

    def read(
        self, source: str, *, bad_records: BadRecords = "error", report: ReadReport | None = None
    ) -> Iterator[R]:
        """The records of a source, in order; see `preference_records`."""
        if source == "embedded":
            return iter(self.embedded())
        return read_records(source, self.of_row, bad_records, report)


def _single(of_row: Callable[[Row], R], row: Row) -> list[R]:
    return [of_row(row)]


PREFERENCES = RecordKind(
    of_row=functools.partial(_single, preference_of_row), embedded=embedded_preferences
)
RESPONSES = RecordKind(
    of_row=functools.partial(_single, response_of_row), embedded=embedded_responses
)
TEXTS = RecordKind(of_row=functools.partial(_single, text_of_row), embedded=embedded_texts)


def unpaired_kind(threshold: float | None) -> RecordKind[UnpairedRecord]:
    """Labelled responses, with the threshold of `unpaired_records`."""
    return RecordKind(
        of_row=functools.partial(unpaired_of_row, threshold=threshold),
        embedded=lambda: as_unpaired(embedded_preferences()),
    )


def preference_records(
    source: str, *, bad_records: BadRecords = "error", report: ReadReport | None = None
) -> Iterator[PreferenceRecord]:
    r"""Preference pairs of a source, in order.

    Each row has one of three forms: prompt, chosen and rejected as text; conversations
    (lists of {role, content}) whose prompt is given or is what chosen and rejected share; and
    HH-RLHF's two transcripts, whose prompt is the longest common prefix that ends at an
    assistant turn ("\n\nAssistant:" included).

    Args:
      source: a file (.jsonl, .json, .parquet; .gz, .xz), a folder, `tfds:NAME`, a hub name, each
        with an optional `#train[:90%]`; or "embedded".
      bad_records: "error" stops at a row that cannot be used, "skip" counts it.
      report: filled while reading.

    Raises:
      UserError: names the file and line of the first bad record, or a missing source.
    """
    return PREFERENCES.read(source, bad_records=bad_records, report=report)


def response_records(
    source: str, *, bad_records: BadRecords = "error", report: ReadReport | None = None
) -> Iterator[PromptResponseRecord]:
    """Prompts and responses to imitate: {prompt, response} or {prompt, completion}, {messages}
    whose last turn is the response, or preference pairs, whose chosen response is taken.

    Args:
      source: as for `preference_records`.
      bad_records: "error" or "skip".
      report: filled while reading.
    """  # noqa: D205
    return RESPONSES.read(source, bad_records=bad_records, report=report)


def prompt_records(
    source: str,
    *,
    bad_records: BadRecords = "error",
    report: ReadReport | None = None,
    keep_fields: bool = False,
) -> Iterator[PromptRecord]:
    """Prompts to respond to: {prompt}, {messages} up to the last turn that is not a response, JSON
    strings, or the prompts of any other records.

    Args:
      source: as for `preference_records`.
      bad_records: "error" or "skip".
      report: filled while reading.
      keep_fields: whether records keep all fields of their rows.
    """  # noqa: D205
    if source == "embedded":
        return (
            PromptRecord(prompt=record.prompt, source=record.source, line=record.line)
            for record in embedded_responses()
        )
    of_row = functools.partial(prompt_of_row, keep_fields=keep_fields)
    columns = None if keep_fields else COLUMNS
    return read_records(source, lambda row: [of_row(row)], bad_records, report, columns)


def unpaired_records(
    source: str,
    *,
    threshold: float | None = None,
    bad_records: BadRecords = "error",
    report: ReadReport | None = None,
) -> Iterator[UnpairedRecord]:
    """Labelled responses: {prompt, completion or response, label or score}.

    Args:
      source: as for `preference_records`; pairs give one desirable and one undesirable record each.
      threshold: smallest number that is a desirable label; None: labels are true or false, 1 or 0.
      bad_records: "error" or "skip".
      report: filled while reading.
    """
    return unpaired_kind(threshold).read(source, bad_records=bad_records, report=report)


def text_records(
    source: str, *, bad_records: BadRecords = "error", report: ReadReport | None = None
) -> Iterator[TextRecord]:
    """Documents: {text} rows, JSON strings, or whole text files.

    Args:
      source: as for `preference_records`, or a .txt file (one document).
      bad_records: "error" or "skip".
      report: filled while reading.
    """
    return TEXTS.read(source, bad_records=bad_records, report=report)


def split_holdout(
    records: Iterable[P], fraction: float, *, seed: int = 0
) -> tuple[list[P], list[P]]:
    """Training and held-out records; all records of one prompt are on the same side.

    A prompt is held out if its hash is below the fraction, so adding or removing records does not
    move any other record.

    Args:
      records: preference, response, unpaired or text records.
      fraction: fraction of prompts to hold out, in [0, 1).
      seed: of the choice of prompts.

    Returns:
      (training records, held-out records), each in the order given.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"holdout: {fraction} is not in [0, 1)")
    sides: tuple[list[P], list[P]] = ([], [])
    for record in records:
        sides[holdout_value(record, seed) < fraction].append(record)
    return sides


def holdout_value(record: Any, seed: int) -> float:
    """A number in [0, 1) that is determined by a record's prompt, or text, and the seed."""
    prompt = record.text if isinstance(record, TextRecord) else record.prompt
    content = json.dumps([seed, prompt], sort_keys=True, ensure_ascii=False).encode("utf-8")
    return int.from_bytes(hashlib.sha256(content).digest()[:8]) / 2**64


def read_records(
    source: str,
    make: Callable[[Row], list[R]],
    bad_records: BadRecords = "error",
    report: ReadReport | None = None,
    columns: Collection[str] | None = COLUMNS,
) -> Iterator[R]:
    """The records of a source; a fault raises an error or is counted.

    Args:
      source: as for `preference_records`.
      make: the records of a row; raises a `BadRecordError`.
      bad_records: "error" or "skip".
      report: filled while reading; None: what was skipped is told in the end.
      columns: fields that `make` reads; None: all.

    Raises:
      UserError: names the file and line of the first bad record, or a source without records.
    """
    own = ReadReport()
    counted = own if report is None else report
    try:
        for row in read_rows(source, columns):
            counted.read += 1
            try:
                if row.fault is not None:
                    raise row.fault
                made = make(row)
            except BadRecordError as fault:
                refuse(row, fault, bad_records, counted)
                continue
            yield from made
    finally:  # also where the caller reads only the first ones
        if own.skipped and own.kept:
            notice(f"{source}: {own.summary()}")
    if not counted.kept:
        raise nothing_usable(source, counted)


def read_rows(source: str, columns: Collection[str] | None = None) -> Iterator[Row]:
    """Rows of a source: a file, a folder, `tfds:NAME` or a hub name, each with `#split`.

    Args:
      source: what is read.
      columns: fields that the caller reads; in Parquet files all others are None. None: all.

    Raises:
      UserError: there is no such source, it cannot be read, or its split does not exist.
    """
    name, split = split_name(source)
    if name.startswith("tfds:"):
        yield from _tfds_rows(name.removeprefix("tfds:"), split or "train")
        return
    try:
        path = Path(name).expanduser()
        exists = path.is_dir() or path.is_file()
    except (OSError, RuntimeError) as error:
        raise unreadable(source, error) from None
    if exists:
        yield from path_rows(path, split, columns)
        return
    hint = "; the part after # is a split, as in FILE#train[:90%]" if "#" in source else ""
    is_file = suffix(path) in FILES or suffix(Path(source)) in FILES
    if is_file or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(
            f"{source}: no such file; data is a file ({', '.join(FILES)}), "
            f"tfds:NAME, a Hugging Face hub name, or embedded{hint}"
        )
    try:
        yield from _hub_rows(name, split or "train")
    except ImportError:
        raise UserError(
            f"{source}: there is no such file, and a Hugging Face hub name needs the extra: "
            f"pip install 'jaxalign[hub]'{hint}"
        ) from None


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    import datasets  # pyright: ignore[reportMissingImports]

    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{name}#{split}: could not load it from the Hub: {first}") from None
    for number, value in enumerate(rows, start=1):
        yield Row(f"{name}#{split}", number, value, unit="record")


def _tfds_rows(name: str, split: str) -> Iterator[Row]:
    """A data set that TFDS has prepared as ArrayRecord; `name@folder` names its data folder."""
    import tensorflow_datasets as tfds

    import jaxalign.data.builders  # noqa: F401 (registers the preference builders)

    try:
        dataset, _, folder = name.partition("@")
        data_dir = str(Path(folder).expanduser()) if folder else None
        # without a stored copy TFDS would download data
        stored: Any = tfds.builder(dataset, data_dir=data_dir)
        rows = stored.as_data_source(split=split)
    except (
        tfds.core.DatasetNotFoundError,
        AssertionError,
        KeyError,  # no such split, or none at all yet
        OSError,
        ValueError,
    ) as error:
        first = str(error).strip(" \n\"'").splitlines()[0]
        raise UserError(
            f"tfds:{name}#{split}: cannot be read: {first}; prepare it as array_record, the "
            "preference sets with jaxalign.data.builders.prepare"
        ) from None
    source = f"tfds:{name}#{split}"
    for number, value in enumerate(rows, start=1):
        try:
            yield Row(source, number, plain(value), unit="record")
        except UnicodeDecodeError as error:
            fault = BadRecordError("invalid UTF-8", f"byte {error.start + 1} of a field")
            yield Row(source, number, None, fault, unit="record")


def plain(value: Any) -> Any:
    """Values of TFDS as plain JSON values."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, Mapping):
        fields = {key: plain(item) for key, item in value.items()}
        turns = set(fields) == {"role", "content"} and isinstance(fields["role"], list)
        if turns:  # a sequence of messages in the layout of TFDS
            return [
                {"role": role, "content": content}
                for role, content in zip(fields["role"], fields["content"], strict=True)
            ]
        return fields
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
