"""Rows of a file, a hub or a TFDS data set, and what to do with those that cannot be used."""

import gzip
import io
import json
import lzma
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from jaxalign.errors import UserError

BadRecords = Literal["error", "skip"]

FILES = (".jsonl", ".json", ".parquet", ".txt", ".md")
PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}


class BadRecordError(Exception):
    """A row that cannot be used: what kind of fault, and what exactly."""

    def __init__(self, kind: str, what: str):
        super().__init__(what)
        self.kind = kind


@dataclass(kw_only=True)
class ReadReport:
    """How many rows were read, and how many of each kind of fault were skipped."""

    read: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    """Place and fault of the first skipped row of each kind."""

    @property
    def kept(self) -> int:
        """Rows that became records."""
        return self.read - self.skipped.total()

    def summary(self) -> str:
        """One line for the log."""
        if not self.skipped:
            return f"{self.read} records"
        kinds = "; ".join(
            f"{count} {kind} (first: {self.first[kind]})"
            for kind, count in sorted(self.skipped.items())
        )
        return f"{self.kept} of {self.read} records; skipped {kinds}"


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read: a mapping or text, or the fault that kept it from being one."""

    source: str
    line: int
    value: Any
    fault: BadRecordError | None = None
    unit: str = "line"

    @property
    def place(self) -> str:
        """Where a user finds it."""
        return (
            f"{self.source}:{self.line}"
            if self.unit == "line"
            else (f"{self.source}, {self.unit} {self.line}")
        )


def refuse(row: Row, fault: BadRecordError, policy: BadRecords, report: ReadReport) -> None:
    """Stop with the row's place, or count it as skipped."""
    message = f"{row.place}: {fault.kind}: {fault}"
    if policy == "error":
        raise UserError(f"{message}; mend the record, or set bad_records to skip") from None
    if policy != "skip":
        raise UserError(f"bad_records: {policy!r} is neither 'error' nor 'skip'")
    report.skipped[fault.kind] += 1
    report.first.setdefault(fault.kind, message)


def split_name(source: str) -> tuple[str, str]:
    """`name#train[:90%]` -> ("name", "train[:90%]"); no split is ""."""
    name, _, split = source.partition("#")
    return name, split


def read_rows(source: str) -> Iterator[Row]:
    """Rows of a source: a file, a folder, `tfds:NAME` or a hub name, each with `#split`.

    Raises:
      UserError: there is no such source, or its split does not exist.
    """
    name, split = split_name(source)
    if name.startswith("tfds:"):
        yield from _tfds_rows(name.removeprefix("tfds:"), split or "train")
        return
    path = Path(name).expanduser()
    if path.is_dir():
        base, window = _parse_split(source, split)
        rows = (row for file in _files_of_split(path, base) for row in _file_rows(file))
        yield from _slice(rows, window, source)
    elif path.is_file():
        base, window = _parse_split(source, split)
        if base not in ("", "train", "all"):
            raise UserError(f"{source}: a single file has no split {base!r}; use {name}#[:90%]")
        yield from _slice(_file_rows(path), window, source)
    elif _suffix(path) in FILES or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(
            f"{name}: no such file; data is a file ({', '.join(FILES)}), "
            "tfds:NAME, a Hugging Face hub name, or embedded"
        )
    else:
        yield from _hub_rows(name, split or "train")


def _suffix(path: Path) -> str:
    """The kind of file, compression aside."""
    if path.suffix in PACKED:
        path = path.with_suffix("")
    return path.suffix


def _files_of_split(folder: Path, split: str) -> Sequence[Path]:
    """Files of a folder whose names begin with the split's name."""
    files = [
        file
        for file in sorted(folder.iterdir())
        if _suffix(file) in FILES and file.name.startswith("" if split == "all" else split)
    ]
    if not files:
        wanted = f"{split}*" if split else "*"
        raise UserError(
            f"{folder}: no file {wanted} of a kind that can be read: {', '.join(FILES)}"
        )
    return files


def _parse_split(source: str, split: str) -> tuple[str, tuple[str, str] | None]:
    """`train[10%:20%]` -> ("train", ("10%", "20%"))."""
    match = re.fullmatch(r"([\w.-]*)(?:\[(-?\d*%?):(-?\d*%?)\])?", split)
    if match is None:
        raise UserError(
            f"{source}: split {split!r} is not of the form train[:90%] or test[100:200]"
        )
    base, start, stop = match.groups()
    return base, None if start is None else (start, stop)


def _slice(rows: Iterator[Row], window: tuple[str, str] | None, source: str) -> Iterator[Row]:
    """The rows from start to stop, each a number or a percentage, negative from the end."""
    if window is None:
        return rows
    if all(not part.startswith("-") and not part.endswith("%") for part in window):
        start, stop = (int(part) if part else None for part in window)
        return islice(rows, start, stop)
    everything = list(rows)

    def index(part: str, default: int) -> int:
        if not part:
            return default
        if not part.endswith("%"):
            return int(part)
        if not -100 <= int(part[:-1]) <= 100:
            raise UserError(f"{source}: {part} is not between -100% and 100%")
        return round(len(everything) * int(part[:-1]) / 100)

    return iter(everything[index(window[0], 0) : index(window[1], len(everything))])


def _file_rows(path: Path) -> Iterator[Row]:
    """Rows of one file, by its name's ending."""
    kind = _suffix(path)
    if kind == ".parquet":
        return _parquet_rows(path)
    if kind == ".jsonl":
        return json_lines(path)
    if kind == ".json":
        return _json_array(path)
    if kind in (".txt", ".md"):
        return _plain_text(path)
    raise UserError(
        f"{path}: a file ending in {path.suffix!r} cannot be read; use one of "
        f"{', '.join(FILES)}, also packed as .gz or .xz (parquet as it is)"
    )


def _open(path: Path) -> io.BufferedIOBase:
    return PACKED[path.suffix](path, "rb") if path.suffix in PACKED else path.open("rb")


def json_lines(path: Path) -> Iterator[Row]:
    """One JSON value per line; empty lines are passed over."""
    source = str(path)
    with _open(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _json_row(source, number, line)
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError) as error:
            raise UserError(f"{path}: damaged archive ({error}); fetch it again") from None


def _json_row(source: str, number: int, line: bytes) -> Row:
    try:
        encoding = "utf-8-sig" if number == 1 else "utf-8"  # a byte order mark may come first
        return Row(source, number, json.loads(line.decode(encoding).rstrip()))
    except UnicodeDecodeError as error:
        fault = BadRecordError(
            "invalid UTF-8", f"byte {error.start + 1} of the line: {error.reason}"
        )
    except (json.JSONDecodeError, RecursionError) as error:
        fault = BadRecordError("invalid JSON", str(error))
    return Row(source, number, None, fault)


def _json_array(path: Path) -> Iterator[Row]:
    """One JSON array of records."""
    with _open(path) as file:
        raw = file.read()
    try:
        values = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: invalid UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        hint = (
            "; a file of one record per line is named .jsonl" if "Extra data" in str(error) else ""
        )
        raise UserError(f"{path}:{error.lineno}: invalid JSON: {error.msg}{hint}") from None
    if not isinstance(values, list):
        raise UserError(f"{path}: a {type(values).__name__}, not an array of records")
    for number, value in enumerate(values, start=1):
        yield Row(str(path), number, value, unit="record")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from None
    number = 0
    for batch in file.iter_batches(batch_size=1024):
        for value in batch.to_pylist():
            number += 1
            yield Row(str(path), number, value, unit="record")


def _plain_text(path: Path) -> Iterator[Row]:
    """A whole file is one document."""
    with _open(path) as file:
        raw = file.read()
    try:
        yield Row(str(path), 1, raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        yield Row(str(path), line, None, BadRecordError("invalid UTF-8", error.reason))


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"{name}: there is no such file, and a Hugging Face hub name needs the extra: "
            "pip install 'jaxalign[hub]'"
        ) from None
    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{name}#{split}: the hub does not give it: {first}") from None
    for number, value in enumerate(rows, start=1):
        yield Row(f"{name}#{split}", number, value, unit="record")


def _tfds_rows(name: str, split: str) -> Iterator[Row]:
    """A data set that TFDS has prepared as ArrayRecord; `name@folder` names its data folder."""
    import tensorflow_datasets as tfds

    import jaxalign.data.builders  # noqa: F401 (registers the preference builders)

    try:
        dataset, _, folder = name.partition("@")
        data_dir = str(Path(folder).expanduser()) if folder else None
        # without a stored copy TFDS would fetch data, which nobody has asked for
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
    """What TFDS yields, as the plain values that JSON would hold."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, Mapping):
        fields = {key: plain(item) for key, item in value.items()}
        turns = set(fields) == {"role", "content"} and isinstance(fields["role"], list)
        if turns:  # a sequence of messages, as TFDS lays it out
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
