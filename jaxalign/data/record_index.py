"""Records that stay on disk: an index of the lines of JSON Lines files, and access by number."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
from jaxtyping import Bool, Float64, Int

from jaxalign.data.building import ALONE, Processes, built, key_of, name_of
from jaxalign.data.forms import COLUMNS
from jaxalign.data.reading import (
    BadRecordError,
    BadRecords,
    ReadReport,
    Row,
    json_row,
    nothing_usable,
    opened,
    refuse,
    source_files,
    unreadable,
)
from jaxalign.data.sources import RecordKind, holdout_value, read_rows
from jaxalign.errors import UserError
from jaxalign.files import open_bytes, read_json, write_array, write_arrays, write_json

R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")

BYTES = 64 * 2**20
"""Bytes of a part of a file that is indexed at once."""
FILES, INDEX = "files.json", "index.json"
COLUMN_TYPES = {"offset": np.int64, "line": np.int64, "held_out": np.float64, "label": np.bool_}
"""What the index has of each record: where its line begins, the line's number, `holdout_value`, and
the label of a labelled response."""


@dataclass(frozen=True)
class Computed(Sequence[T]):
    """A sequence whose items are computed when they are read."""

    length: int
    item: Callable[[int], T]

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self.item(at) for at in range(*index.indices(self.length))]
        return self.item(range(self.length)[index])


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Some records of an index."""

    folder: Path
    """Of the index."""
    numbers: Int[np.ndarray, " records"]


class IndexedRecords(Sequence[R]):
    """Records of indexed files; a record is read from its file whenever it is asked for.

    Args:
      selections: records of one index after the other.
      of_row: as in `RecordKind`.
      then: what becomes of a record, one function after the other.
    """

    def __init__(
        self,
        selections: Sequence[Selection],
        of_row: Callable[[Row], list[Any]],
        then: Sequence[Callable[[Any], Any]] = (),
    ):
        self._selections, self._of_row, self._then = tuple(selections), of_row, tuple(then)
        self._length = sum(len(one.numbers) for one in self._selections)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[R]:
        for one in self._selections:
            for record in _records(_open(one.folder), one.numbers, self._of_row):
                yield functools.reduce(lambda value, change: change(value), self._then, record)

    @overload
    def __getitem__(self, index: int) -> R: ...
    @overload
    def __getitem__(self, index: slice) -> "IndexedRecords[R]": ...
    def __getitem__(self, index: int | slice) -> "R | IndexedRecords[R]":
        if not isinstance(index, slice):
            at = range(len(self))[index]
            return next(iter(self[at : at + 1]))
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"{index}: only consecutive records are taken")
        taken, before = [], 0
        for one in self._selections:
            numbers = one.numbers[max(0, start - before) : max(0, stop - before)]
            taken += [dataclasses.replace(one, numbers=numbers)] if len(numbers) else []
            before += len(one.numbers)
        return IndexedRecords(taken, self._of_row, self._then)

    def map(self, change: Callable[[R], S]) -> "IndexedRecords[S]":
        """The records that a function makes of these; it can be pickled."""
        return IndexedRecords(self._selections, self._of_row, (*self._then, change))

    def split(self, fraction: float) -> "tuple[IndexedRecords[R], IndexedRecords[R]]":
        """As `split_holdout`, with the seed of the index."""
        sides: tuple[list[Selection], list[Selection]] = ([], [])
        for one in self._selections:
            is_held_out = _open(one.folder).held_out[one.numbers] < fraction
            for side, some in zip(sides, (~is_held_out, is_held_out), strict=True):
                side.append(dataclasses.replace(one, numbers=one.numbers[some]))
        train, held_out = (IndexedRecords(side, self._of_row, self._then) for side in sides)
        return train, held_out

    @property
    def prompt_values(self) -> Float64[np.ndarray, " records"]:
        """`holdout_value` of each record, with the seed of the index."""
        values = [_open(one.folder).held_out[one.numbers] for one in self._selections]
        return np.concatenate([np.empty(0), *values])

    @property
    def labels(self) -> Bool[np.ndarray, " records"]:
        """Of labelled responses: which are desirable."""
        return np.concatenate([_open(one.folder).label[one.numbers] for one in self._selections])

    @property
    def folders(self) -> Sequence[Path]:
        """Of the indexes."""
        return [one.folder for one in self._selections]

    @property
    def places(self) -> Sequence[str]:
        """File and line of each record."""
        first = np.cumsum([0, *(len(one.numbers) for one in self._selections)])

        def place(number: int) -> str:
            at = int(np.searchsorted(first, number, side="right")) - 1
            one = self._selections[at]
            return _open(one.folder).place(int(one.numbers[number - first[at]]))

        return Computed(len(self), place)

    @property
    def facts(self) -> Any:
        """What the records depend on, as a JSON value."""
        chosen = [
            (one.folder.name, hashlib.sha256(one.numbers.tobytes()).hexdigest())
            for one in self._selections
        ]
        return [chosen, name_of(self._of_row), [name_of(one) for one in self._then]]


def joined(records: Sequence[IndexedRecords[R]]) -> IndexedRecords[R]:
    """Records of the same kind, one sequence after the other."""
    selections = itertools.chain.from_iterable(one._selections for one in records)
    return IndexedRecords(list(selections), records[0]._of_row, records[0]._then)


# ------------------------------------------------------------------------------ reading


@dataclass(frozen=True, kw_only=True)
class _File:
    """A file with one JSON value per line, and where the rows come from."""

    path: str
    """Absolute, or relative to the index's folder."""
    source: str
    unit: str
    """Of the number of a row, in messages."""
    size: int
    """Bytes."""
    records: int = 0


@dataclass(frozen=True, kw_only=True)
class _Index:
    """An open index; its arrays are memory maps."""

    folder: Path
    files: Sequence[_File]
    first: np.ndarray
    """Number of each file's first record; last, of all records."""
    offset: np.ndarray
    line: np.ndarray
    held_out: np.ndarray
    label: np.ndarray

    def file_of(self, record: int) -> int:
        """Number of the file that a record is in."""
        return int(np.searchsorted(self.first, record, side="right")) - 1

    def place(self, record: int) -> str:
        """File and line of a record."""
        return f"{self.files[self.file_of(record)].source}:{self.line[record]}"


@functools.lru_cache(maxsize=64)
def _open(folder: Path) -> _Index:
    files = [_File(**one) for one in read_json(folder / INDEX, "index")["files"]]
    return _Index(
        folder=folder,
        files=files,
        first=np.cumsum([0, *(file.records for file in files)]),
        **{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMN_TYPES},
    )


def _records(
    index: _Index, numbers: Sequence[int] | np.ndarray, of_row: Callable[[Row], list[R]]
) -> Iterator[R]:
    """The named records of an index; consecutive ones of a line are made once."""
    current, file, known, made = -1, None, -1, []
    try:
        for number in map(int, numbers):
            at, offset = index.file_of(number), int(index.offset[number])
            if at != current:
                if file is not None:
                    file.close()
                current, known = at, -1
                file = (index.folder / index.files[at].path).open("rb")
                if os.fstat(file.fileno()).st_size != index.files[at].size:
                    raise _changed(index.files[at].source, "another size")
            assert file is not None
            if offset != known:
                file.seek(offset)
                made, known = _made(index, number, file.readline(), of_row), offset
            first = number  # of the records of this line
            while first > index.first[at] and index.offset[first - 1] == offset:
                first -= 1
            if number - first >= len(made):
                raise _changed(index.place(number), "fewer records")
            yield made[number - first]
    except OSError as error:
        raise unreadable(index.files[current].source, error) from None
    finally:
        if file is not None:
            file.close()


def _made(index: _Index, number: int, line: bytes, of_row: Callable[[Row], list[R]]) -> list[R]:
    """The records of the line of a record."""
    file = index.files[index.file_of(number)]
    row = json_row(file.source, int(index.line[number]), line, unit=file.unit)
    try:
        if row.fault is not None:
            raise row.fault
        return of_row(row)
    except BadRecordError as fault:
        raise _changed(index.place(number), f"{fault.kind}: {fault}") from None


def _changed(place: str, what: str) -> UserError:
    return UserError(
        f"{place}: {what}: the file has changed since it was indexed; run the same command again"
    )


# ------------------------------------------------------------------------------ indexing


def index_records(
    source: str,
    kind: RecordKind[R],
    *,
    cache: Path,
    seed: int = 0,
    bad_records: BadRecords = "error",
    processes: Processes = ALONE,
    workers: int | None = None,
) -> tuple[IndexedRecords[R], ReadReport]:
    """The records of a source, indexed at the first time.

    The index of a file of another size or time of change is another one. Rows that are not lines of
    a file (compressed ones, Parquet, TFDS, the Hub, a split of rows) are first copied to JSON Lines
    in the index's folder, one after the other.

    Args:
      source: as for `preference_records`, but not "embedded".
      kind: of the records.
      cache: folder of indexes.
      seed: of `split`.
      bad_records: as for `preference_records`.
      processes: of the run; each indexes its own parts.
      workers: processes of this one that index; None: one for each core.

    Raises:
      UserError: names the file and line of a bad record, or a source without records.
    """
    files, whole = source_files(source)
    key = key_of(
        "index", source, _identity(files), name_of(kind.of_row), seed, bad_records, COLUMNS
    )
    plain = files if whole and all(file.suffix == ".jsonl" for file in files) else []
    folder = built(
        cache,
        label_of(source),
        key,
        prepare=functools.partial(_prepare, source=source, files=plain, bad_records=bad_records),
        parts=_parts,
        work=functools.partial(
            _index_lines, of_row=kind.of_row, seed=seed, bad_records=bad_records
        ),
        merge=_merge,
        what=f"indexing {source}",
        processes=processes,
        workers=workers,
    )
    index = read_json(folder / INDEX, "index")
    report, number = ReadReport(**index["report"]), sum(x["records"] for x in index["files"])
    if not number:
        raise nothing_usable(source, report)
    every = Selection(folder=folder, numbers=np.arange(number))
    return IndexedRecords([every], kind.of_row), report


def label_of(source: str) -> str:
    """The beginning of the name of a source's folder."""
    last = Path(source.partition("#")[0]).name.partition(".")[0]
    return re.sub(r"[^\w-]+", "_", last)[:40] or "data"


def _identity(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of change of files."""
    found = []
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise unreadable(str(file), error) from None
        found.append((str(file.absolute()), status.st_size, status.st_mtime_ns))
    return found


def _prepare(folder: Path, *, source: str, files: Sequence[Path], bad_records: BadRecords) -> None:
    """List the files with the lines, or copy the rows to such files."""
    if (folder / FILES).exists():
        return
    lines, report = [], ReadReport()
    for path in files:
        with opened(path) as file:  # raises if it is compressed, say
            size = os.fstat(file.fileno()).st_size
        here = str(path.absolute())
        lines.append(_File(path=here, source=str(path), unit="line", size=size))
    if not files:
        lines = _copy(source, folder, bad_records, report)
    content = {"files": [asdict(one) for one in lines], "report": asdict(report)}
    write_json(folder / FILES, content)


def _copy(source: str, folder: Path, bad_records: BadRecords, report: ReadReport) -> list[_File]:
    """Write each row to the line of its number; skipped rows are counted and leave a line empty."""
    files: list[_File] = []
    named = itertools.groupby(read_rows(source, COLUMNS), lambda row: (row.source, row.unit))
    for (name, unit), rows in named:
        path, written = f"rows-{len(files)}.jsonl", 0
        with open_bytes(folder / path, "w") as file:
            for row in rows:
                if row.fault is not None:
                    report.read += 1
                    refuse(row, row.fault, bad_records, report)
                    continue
                file.write(b"\n" * (row.line - 1 - written) + _line(row))
                written = row.line
            size = file.tell()
        files.append(_File(path=path, source=name, unit=unit, size=size))
    return files


def _line(row: Row) -> bytes:
    try:
        return json.dumps(row.value).encode("ascii") + b"\n"
    except TypeError as error:
        raise UserError(
            f"{row.place}: {error}, so the rows cannot be kept on disk; set --streaming never"
        ) from None


@dataclass(frozen=True, kw_only=True)
class _Lines:
    """The lines of a file that begin in a range of its bytes."""

    path: Path
    """Of the part of the index."""
    file: _File
    lines: Path
    """The file."""
    start: int
    stop: int


def _parts(folder: Path) -> list[_Lines]:
    parts = []
    for number, one in enumerate(read_json(folder / FILES, "list of files")["files"]):
        file = _File(**one)
        lines = folder / file.path
        for start in range(0, max(file.size, 1), BYTES):
            stop = min(start + BYTES, file.size)
            path = folder / f"index-{number}-{start}-{stop}.npz"
            parts.append(_Lines(path=path, file=file, lines=lines, start=start, stop=stop))
    return parts


def _index_lines(
    part: _Lines, *, of_row: Callable[[Row], list[Any]], seed: int, bad_records: BadRecords
) -> None:
    """Write the part of the index of these lines, numbered from 1."""
    columns: dict[str, list[Any]] = {name: [] for name in COLUMN_TYPES}
    faults: dict[str, tuple[int, int, str]] = {}
    number, read = 0, 0
    source, unit = part.file.source, part.file.unit
    with part.lines.open("rb") as file:
        file.seek(max(0, part.start - 1))
        if part.start:
            file.readline()  # the rest of a line of the part before
        begin = offset = file.tell()
        while offset < part.stop and (line := file.readline()):
            number += 1
            if line.strip():
                read += 1
                # a byte order mark is not expected in later parts
                row = json_row(source, number + (part.start > 0), line, unit=unit)
                try:
                    if row.fault is not None:
                        raise row.fault
                    for record in of_row(dataclasses.replace(row, line=number)):
                        columns["offset"].append(offset)
                        columns["line"].append(number)
                        columns["held_out"].append(holdout_value(record, seed))
                        columns["label"].append(getattr(record, "label", False))
                except BadRecordError as fault:
                    if bad_records != "skip":
                        before = _count_lines(part.lines, begin)
                        row = dataclasses.replace(row, line=before + number)
                        refuse(row, fault, bad_records, ReadReport())
                    count, first, what = faults.get(fault.kind, (0, number, str(fault)))
                    faults[fault.kind] = count + 1, first, what
            offset += len(line)
    arrays = {name: np.asarray(values, COLUMN_TYPES[name]) for name, values in columns.items()}
    counts = np.asarray([number, read])
    write_arrays(part.path, **arrays, counts=counts, faults=np.asarray(json.dumps(faults)))


def _count_lines(path: Path, stop: int) -> int:
    """Number of lines that end in the first bytes of a file."""
    count = 0
    with path.open("rb") as file:
        while block := file.read(min(2**20, stop - file.tell())):
            count += block.count(b"\n")
    return count


def _merge(folder: Path, parts: Sequence[_Lines]) -> None:
    """Write the whole index; lines are numbered from the beginning of their file."""
    listed = read_json(folder / FILES, "list of files")
    report = ReadReport(**listed["report"])
    columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMN_TYPES}
    files = []
    for file, of_file in itertools.groupby(parts, key=lambda part: part.file):
        before, records = 0, 0
        for part in of_file:
            with np.load(part.path) as found:
                lines, read = found["counts"].tolist()
                for name, values in columns.items():
                    values.append(found[name] + before if name == "line" else found[name])
                records += len(found["line"])
                report.read += read
                for kind, (count, first, what) in json.loads(str(found["faults"])).items():
                    report.skipped[kind] = report.skipped.get(kind, 0) + count
                    place = Row(file.source, before + first, None, unit=file.unit).place
                    report.first.setdefault(kind, f"{place}: {kind}: {what}")
                before += lines
        files.append(asdict(dataclasses.replace(file, records=records)))
    for name, values in columns.items():
        whole = np.concatenate([np.empty(0, COLUMN_TYPES[name]), *values])
        write_array(folder / f"{name}.npy", whole)
    write_json(folder / INDEX, {"files": files, "report": asdict(report)})
