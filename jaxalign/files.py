"""Output files: checked before the work, written atomically, with one-line errors."""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxalign.errors import OutputError, UserError, notice

PARTIAL = ".partial"
"""Suffix of a file or folder that is still being written."""
LOCK = ".lock"
OS_ERROR = re.compile(r"\bos[ _]error(?:_code)?[ :=]+'?(\d+)", re.IGNORECASE)
"""Form in which libraries in other languages report errors of the operating system."""


def check_output(
    path: Path,
    option: str,
    *,
    folder: bool = False,
    files: Iterable[str] = (),
    inputs: Iterable[str | Path | None] = (),
) -> None:
    """Create the folder of an output, and check that the output can be written there.

    Call it before any expensive work. An existing file is not changed.

    Args:
      path: of the file, or of a folder for several files.
      option: that sets it, for the message, e.g. "--output".
      folder: whether `path` is a folder.
      files: names of the files that are written in the folder, or beside the file.
      inputs: names of what the command reads; only those of files count.

    Raises:
      UserError: it cannot be written, or a file to write is an input.
    """
    inside = path if folder else path.parent
    outputs = [inside / name for name in files] + ([] if folder else [path])
    inputs = [one for one in inputs if one is not None]
    for output in outputs:
        if any(_is_same_file(output, Path(one)) for one in inputs):
            raise UserError(
                f"{output}: is an input, and would be overwritten; set another {option}"
            )
    try:
        inside.mkdir(parents=True, exist_ok=True)
        if not folder and path.exists():
            path.open("ab").close()
        else:
            with contextlib.suppress(FileNotFoundError):
                os.lstat(inside / f"{path.name}{PARTIAL}")  # raises if the name is invalid
            tempfile.TemporaryFile(dir=inside).close()
    except FileExistsError:
        raise UserError(f"{path}: cannot be written: Not a directory; set {option}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be written: {reason}; set {option}") from None


def _is_same_file(path: Path, other: Path) -> bool:
    """Whether both are one file, also by links; devices are none."""
    try:
        return path.is_file() and path.samefile(other)
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context that turns errors of writing a file into `OutputError`.

    Raises:
      OutputError: an error of the operating system, from any library; names the file.
    """
    try:
        yield
    except (OutputError, UserError):
        raise
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        raise OutputError(
            f"{path}: cannot be written: {reason}; everything written before is kept; run the "
            "same command again to resume"
        ) from error


def _reason(error: BaseException) -> str | None:
    """The operating system's message in an error; None: it is another kind of error."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or os.strerror(error.errno)
    match = OS_ERROR.search(str(error))
    return None if match is None else os.strerror(int(match[1]))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context with a temporary path, which replaces `path` once it is complete and on disk.

    After a kill, an error or a full disk, the old file is still there. A device is written
    directly.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        with writing(path):
            yield path
        return
    path = path.resolve() if path.is_symlink() else path
    scratch = path.with_name(f"{path.name}{PARTIAL}")
    with writing(path):
        try:
            remove(scratch)
            yield scratch
            _put_in_place(scratch, path)
        except BaseException:
            with contextlib.suppress(OSError):
                remove(scratch)
            raise


def _put_in_place(scratch: Path, path: Path) -> None:
    if scratch.is_file():
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
    scratch.replace(path)


@contextlib.contextmanager
def rewriting(path: Path) -> Iterator[io.TextIOWrapper]:
    """As `replacing`, with an open text file, for long work: its own errors pass unchanged."""
    path = path.resolve() if path.is_symlink() else path
    scratch = path.with_name(f"{path.name}{PARTIAL}")
    try:
        with open_text(scratch, "w") as file:
            yield file
        with writing(path):
            _put_in_place(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(scratch)
        raise


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write one value as JSON per line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def json_value(value: Any) -> Any:
    """The value for JSON: null for NaN and infinities, lists for arrays and tuples."""
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: json_value(one) for name, one in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [json_value(one) for one in value]
    return value


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file that a command has written.

    Args:
      path: of the file.
      what: description of the file, for the message.

    Raises:
      UserError: the file cannot be read, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {what} is not JSON ({error}); restore or remove it") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UserError(f"{path}: {what} is a {kind}, not an object; restore or remove it")
    return value


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays by name to an .npz file, atomically."""
    with replacing(path) as scratch, scratch.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType] (a flag of savez)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write one array to an .npy file, atomically."""
    with replacing(path) as scratch, scratch.open("wb") as file:
        np.save(file, array)


def read_arrays(
    path: Path, names: Sequence[str], *, optional: Sequence[str] = ()
) -> dict[str, np.ndarray] | None:
    """Arrays from `write_arrays` that can be recomputed if the file is damaged.

    Args:
      path: of the file.
      names: of the arrays.
      optional: names of arrays that may be missing.

    Returns:
      The arrays; None: there is no such file, or it is damaged (a line on standard error says so).
    """
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            present = [name for name in optional if name in stored]
            return {name: stored[name] for name in (*names, *present)}
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,  # a file of one array
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        notice(f"{path}: damaged ({error}); recomputed")
        return None


class _NamedFile(io.FileIO):
    """A file whose errors name it."""

    def write(self, data: Any) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        with writing(Path(str(self.name))):
            return super().write(data)


def open_bytes(path: Path, mode: Literal["w", "a"]) -> io.BufferedWriter:
    """Open a file for writing; errors of `write` and `flush` name the file."""
    with writing(path):
        return io.BufferedWriter(_NamedFile(path, mode))


def open_text(path: Path, mode: Literal["w", "a"]) -> io.TextIOWrapper:
    """As `open_bytes`, in UTF-8."""
    return io.TextIOWrapper(open_bytes(path, mode), encoding="utf-8", newline="\n")


@contextlib.contextmanager
def locked(output: Path, option: str, *, folder: bool = False) -> Iterator[None]:
    """Context that locks an output against other commands; a kill also releases the lock.

    Args:
      output: a file or a folder; the lock file stays beside or in it.
      option: that sets it, for the message.
      folder: whether it is a folder.

    Raises:
      UserError: another process holds the lock.
    """
    path = output / LOCK if folder else output.with_name(f".{output.name}{LOCK}")
    with writing(path):
        file = path.open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UserError(
                    f"{output}: {holder} is writing it; wait for it, or set another {option}"
                ) from None
            notice(f"{path}: cannot be locked ({error.strerror}); start no second command")
        else:
            file.truncate(0)
            with writing(path):
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
        yield


def is_locked(output: Path, *, folder: bool = False) -> bool:
    """Whether a command has locked an output.

    Args:
      output: a file or a folder.
      folder: whether it is a folder.
    """
    path = output / LOCK if folder else output.with_name(f".{output.name}{LOCK}")
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    return False


def digest(path: Path) -> str:
    """The SHA-256 of a file's content; about 2 GB/s with hardware support."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(root: Path, files: Iterable[Path]) -> dict[str, str]:
    """The SHA-256 of files, by their names below a folder."""
    files = sorted(files)
    with ThreadPoolExecutor(4) as pool:  # hashing releases the GIL
        values = list(pool.map(digest, files))
    return {str(file.relative_to(root)): one for file, one in zip(files, values, strict=True)}
