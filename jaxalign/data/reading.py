"""Rows of files, and the response to rows that cannot be used."""

import contextlib
import gzip
import json
import lzma
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from jaxalign.errors import RecordError, UserError

T = TypeVar("T")

BadRecords = Literal["error", "skip"]
REFUSED = "refused by the chat template"
"""Kind of fault of a record of which no text can be made."""

FILES = (".jsonl", ".json", ".parquet", ".txt", ".md")
COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
OTHERWISE = {
    b"PAR1": "it holds Parquet; name it .parquet",
    b"ARROW1": "it holds Arrow; convert it to Parquet or JSON Lines",
    b"\x1f\x8b": "it is compressed by gzip; let its name end in .gz",
    b"\xfd7zXZ": "it is compressed by xz; let its name end in .xz",
    b"PK\x03\x04": "it is a zip archive; unpack it",
    b"\xff\xfe": "it is UTF-16; save it as UTF-8",
    b"\xfe\xff": "it is UTF-16; save it as UTF-8",
}
"""First bytes of files whose content does not match their names, and the fix."""


class BadRecordError(Exception):
    """A row that cannot be used: the kind of fault, and a description."""

    def __init__(self, kind: str, what: str):
        super().__init__(what)
        self.kind = kind


@dataclass(kw_only=True)
class ReadReport:
    """How many rows were read, and how many of each kind of fault were skipped."""

    read: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """By kind of fault; a plain dict, since `dataclasses.asdict` spoils a Counter."""
    first: dict[str, str] = field(default_factory=dict)
    """Location and fault of the first skipped row of each kind."""

    @property
    def kept(self) -> int:
        """Rows that became records."""
        return self.read - sum(self.skipped.values())

    def skip(self, kind: str, message: str) -> None:
        """Count a skipped row; of each kind the first message is kept."""
        self.skipped[kind] = self.skipped.get(kind, 0) + 1
        self.first.setdefault(kind, message)

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
    """One row as it was read: a mapping or text, or the fault that prevented it."""

    source: str
    line: int
    value: Any
    fault: BadRecordError | None = None
    unit: str = "line"

    @property
    def place(self) -> str:
        """File and line, or data set and record."""
        return (
            f"{self.source}:{self.line}"
            if self.unit == "line"
            else (f"{self.source}, {self.unit} {self.line}")
        )


def refuse(row: Row, fault: BadRecordError, policy: BadRecords, report: ReadReport) -> None:
    """Raise an error with the row's location, or count it as skipped."""
    message = f"{row.place}: {fault.kind}: {fault}"
    if policy == "error":
        raise UserError(f"{message}; fix the record, or add --bad-records skip") from None
    if policy != "skip":
        raise UserError(f"bad_records: {policy!r} is neither 'error' nor 'skip'")
    report.skip(fault.kind, message)


def accepted(
    records: Iterable[T], read: Callable[[T], Any], policy: BadRecords, report: ReadReport
) -> list[T]:
    """The records that can be read as text; with "skip", those that a template refuses are counted.

    Args:
      records: all of them.
      read: makes the text of a record; raises `RecordError` where it cannot.
      policy: "error": all records stay, and whoever reads them raises the error.
      report: where those that are skipped are counted.
    """
    if policy != "skip":
        return list(records)
    kept = []
    for record in records:
        try:
            read(record)
        except RecordError as error:
            report.skip(REFUSED, str(error))
        else:
            kept.append(record)
    return kept


def nothing_usable(source: str, report: ReadReport) -> UserError:
    """The error of a source without records, or without one that can be used."""
    what = f"no usable record; {report.summary()}" if report.read else "no records in it"
    return UserError(f"{source}: {what}")


def split_name(source: str) -> tuple[str, str]:
    """`name#train[:90%]` -> ("name", "train[:90%]"); no split is "".

    The name of an existing file or folder is never split at its #.
    """
    place = source.partition("@")[2] if source.startswith("tfds:") else source
    name, mark, split = source.rpartition("#")
    if not mark or exists(place) or not (_SPLIT.fullmatch(split) or exists(name)):
        return source, ""
    return name, split


_SPLIT = re.compile(r"([\w.-]*)(?:\[(-?\d*%?):(-?\d*%?)\])?")


def exists(name: str) -> bool:
    """Whether there is a file or folder of this name."""
    try:
        return bool(name) and Path(name).expanduser().exists()
    except (OSError, RuntimeError):  # too long, no permission, no such user
        return False


def path_rows(path: Path, split: str = "", columns: Collection[str] | None = None) -> Iterator[Row]:
    """Rows of a file, or of the files of a folder.

    Args:
      path: of the file or folder.
      split: as in `train[:90%]`; in a folder, files whose names begin with its name.
      columns: fields that the caller reads; in Parquet files all others are None.

    Raises:
      UserError: a file cannot be read, or the split does not exist.
    """
    source = f"{path}#{split}" if split else str(path)
    base, window = _parse_split(source, split)
    try:
        if path.is_dir():
            files = _files_of_split(path, base)
            rows = (row for file in files for row in _file_rows(file, columns))
        elif base in ("", "train", "all"):
            rows = _file_rows(path, columns)
        else:
            raise UserError(f"{source}: a single file has no split {base!r}; use {path}#[:90%]")
        yield from _slice(rows, window, source)
    except (OSError, RuntimeError) as error:
        raise unreadable(source, error) from None


def source_files(source: str) -> tuple[list[Path], bool]:
    """The files of a source, in their order, and whether all their rows are read.

    Args:
      source: as for `preference_records`.

    Returns:
      Files and True; or, of a split of their rows, False. No files: the source is none of files.
    """
    name, split = split_name(source)
    if name.startswith("tfds:") or not exists(name):
        return [], False
    path = Path(name).expanduser()
    base, window = _parse_split(source, split)
    try:
        files = list(_files_of_split(path, base)) if path.is_dir() else [path]
    except OSError as error:
        raise unreadable(source, error) from None
    return files, window is None and (path.is_dir() or base in ("", "train", "all"))


def unreadable(source: str, error: Exception) -> UserError:
    """The error of a source that the operating system cannot read."""
    return UserError(f"{source}: cannot be read: {getattr(error, 'strerror', None) or error}")


def suffix(path: Path) -> str:
    """The file extension before that of the compression."""
    if path.suffix in COMPRESSED:
        path = path.with_suffix("")
    return path.suffix


def _files_of_split(folder: Path, split: str) -> Sequence[Path]:
    """Files of a folder whose names begin with the split's name."""
    files = [
        file
        for file in sorted(folder.iterdir())
        if suffix(file) in FILES
        and file.name.startswith("" if split == "all" else split)
        and file.is_file()
    ]
    if not files:
        wanted = f"{split}*" if split else "*"
        raise UserError(f"{folder}: no readable file {wanted}; readable are {', '.join(FILES)}")
    return files


def _parse_split(source: str, split: str) -> tuple[str, tuple[str, str] | None]:
    """`train[10%:20%]` -> ("train", ("10%", "20%"))."""
    match = _SPLIT.fullmatch(split)
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
        start, stop = (min(int(part), sys.maxsize) if part else None for part in window)
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


def _file_rows(path: Path, columns: Collection[str] | None) -> Iterator[Row]:
    """Rows of one file, by its name's ending."""
    kind = suffix(path)
    if kind == ".parquet":
        return _parquet_rows(path, columns)
    if kind == ".jsonl":
        return json_lines(path)
    if kind == ".json":
        return _json_array(path)
    if kind in (".txt", ".md"):
        return _plain_text(path)
    raise UserError(
        f"{path}: a file ending in {path.suffix!r} cannot be read; use one of "
        f"{', '.join(FILES)}, also compressed as .gz or .xz (not Parquet)"
    )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a text file, decompressed.

    Raises:
      UserError: it cannot be read, or its first bytes are those of another kind of file.
    """
    try:
        with COMPRESSED.get(path.suffix, open)(path, "rb") as file:
            first = file.peek(8)
            for mark, what in OTHERWISE.items():
                if first.startswith(mark):
                    raise UserError(f"{path}: {what}")
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: damaged archive ({error}); download it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_text(path: Path) -> str:
    """The text of a file, decompressed where its name ends in .gz or .xz.

    Raises:
      UserError: it cannot be read, or is not UTF-8 text.
    """
    text, line, reason = _decoded(path)
    if reason:
        raise UserError(f"{path}:{line}: invalid UTF-8: {reason}; save it as UTF-8 text")
    return text


def _decoded(path: Path) -> tuple[str, int, str]:
    """The text of a file; or the first line that is not UTF-8, and why."""
    with opened(path) as file:
        raw = file.read()
    if (zero := raw.find(b"\0")) >= 0:
        return "", raw[:zero].count(b"\n") + 1, "a NUL byte"
    try:
        return raw.decode("utf-8-sig"), 1, ""
    except UnicodeDecodeError as error:
        return "", raw[: error.start].count(b"\n") + 1, error.reason


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
      UserError: it cannot be read, or is not JSON.
    """
    text = read_text(path)
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    try:
        return parse_json(text)
    except BadRecordError as fault:
        line, hint = "", ""
        if isinstance(error := fault.__cause__, json.JSONDecodeError):
            line = f":{error.lineno}"
            if error.msg == "Extra data":
                hint = "; a file of one record per line is named .jsonl"
        raise UserError(f"{path}{line}: {fault.kind}: {fault}{hint}") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
      BadRecordError: it is not JSON, has a name twice in an object, is nested too deeply,
        or has a number of thousands of digits.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise BadRecordError("invalid JSON", str(error)) from error
    except RecursionError:
        raise BadRecordError("invalid JSON", "nested too deeply (recursion limit)") from None
    except ValueError as error:  # Python's limit on the digits of an integer
        raise BadRecordError("invalid JSON", str(error).partition(";")[0]) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise BadRecordError("invalid JSON", f"{name!r} occurs twice in an object")
    return value


def text_fields(kind: type[T], value: Any) -> T:
    """A dataclass of text fields, from a JSON object with exactly those fields.

    Raises:
      BadRecordError: the value is not such an object.
    """
    names = [one.name for one in fields(kind)]  # pyright: ignore[reportArgumentType]
    if not isinstance(value, Mapping) or sorted(value) != sorted(names):
        there = sorted(value) if isinstance(value, Mapping) else type(value).__name__
        raise BadRecordError("wrong type", f"{there} instead of an object with {', '.join(names)}")
    for name, text in value.items():
        check_text(text, name)
    return kind(**value)


def check_text(value: Any, name: str) -> str:
    """The value, checked to be text that UTF-8 can encode.

    Raises:
      BadRecordError: it is not.
    """
    if not isinstance(value, str):
        raise BadRecordError("wrong type", f"{name} is a {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecordError("invalid UTF-8", f"{name} holds a lone surrogate") from None
    return value


def json_lines(path: Path) -> Iterator[Row]:
    """One JSON value per line; empty lines are skipped."""
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield json_row(str(path), number, line)


def json_row(source: str, number: int, line: bytes, *, unit: str = "line") -> Row:
    """The row of a line of JSON; the first one may begin with a byte order mark.

    Args:
      source: name of the file.
      number: of the line, from 1.
      line: its bytes.
      unit: of the number, in messages.
    """
    try:
        encoding = "utf-8-sig" if number == 1 else "utf-8"
        return Row(source, number, parse_json(line.decode(encoding).rstrip()), unit=unit)
    except UnicodeDecodeError as error:
        fault = BadRecordError(
            "invalid UTF-8", f"byte {error.start + 1} of the line: {error.reason}"
        )
    except BadRecordError as error:
        fault = error
    return Row(source, number, None, fault, unit=unit)


def _json_array(path: Path) -> Iterator[Row]:
    """One JSON array of records."""
    values = read_json(path)
    if not isinstance(values, list):
        raise UserError(f"{path}: a {type(values).__name__}, not an array of records")
    for number, value in enumerate(values, start=1):
        yield Row(str(path), number, value, unit="record")


def _parquet_rows(path: Path, columns: Collection[str] | None) -> Iterator[Row]:
    """Rows of a Parquet file: the columns that are read, without times nested in them."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            wanted = set(names if columns is None else columns)
            for name in wanted & {name for name in names if names.count(name) > 1}:
                raise UserError(f"{path}: two columns are named {name}; rename one")
            parts = map(file.schema.column, range(len(file.schema)))
            read = [part.path for part in parts if _is_read(part, wanted)]
            for batch in file.iter_batches(batch_size=1024, columns=read):
                for value in _plain_rows(batch):
                    number += 1
                    if isinstance(value, BadRecordError):
                        yield Row(str(path), number, None, value, unit="record")
                    else:
                        fields = dict.fromkeys(names) | value
                        yield Row(str(path), number, fields, unit="record")
    except pyarrow.ArrowInvalid as error:
        what = "not a Parquet file" if not number else f"damaged after record {number}"
        raise UserError(f"{path}: {what} ({_first_line(error)}); download it again") from None
    except (pyarrow.ArrowException, OSError) as error:
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise UserError(f"{path}: damaged or unreadable Parquet ({reason})") from None


def _is_read(part: Any, wanted: set[str]) -> bool:
    """Whether a leaf of a Parquet schema is read; times nested in turns are not."""
    column, _, inside = part.path.partition(".")
    time = part.logical_type.type in ("DATE", "TIME", "TIMESTAMP") or part.physical_type == "INT96"
    return column in wanted and not (inside and time)


def _plain_rows(batch: Any) -> Iterator[Any]:
    """Rows of a record batch as Python values, or the fault of a row."""
    if not batch.num_columns:
        yield from ({} for _ in range(batch.num_rows))
        return
    with contextlib.suppress(ValueError, OverflowError):  # not UTF-8, a time beyond Python's
        yield from batch.to_pylist()
        return
    for number in range(batch.num_rows):
        try:
            yield batch.slice(number, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield BadRecordError("invalid UTF-8", f"byte {error.start + 1} of a field")
        except (ValueError, OverflowError) as error:
            yield BadRecordError("wrong type", _first_line(error))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _plain_text(path: Path) -> Iterator[Row]:
    """A whole file is one document."""
    text, line, reason = _decoded(path)
    yield Row(str(path), line, text, BadRecordError("invalid UTF-8", reason) if reason else None)
