"""Outputs: checked before the work, written whole or not at all, one line where they cannot be."""

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
"""Behind the name of a file or folder that is still being written."""
LOCK = ".lock"
OS_ERROR = re.compile(r"\bos[ _]error(?:_code)?[ :=]+'?(\d+)", re.IGNORECASE)
"""How libraries in other languages report an error of the operating system."""


def check_output(path: Path, option: str, *, folder: bool = False) -> None:
    """Make the folder that an output goes into, and see that the output can be written there.

    To be called before any expensive work. A file that exists is left as it is.

    Args:
      path: of the file, or of the folder that takes several.
      option: that sets it, for the message, e.g. "--output".
      folder: whether `path` is the folder.

    Raises:
      UserError: it cannot be written.
    """
    inside = path if folder else path.parent
    try:
        inside.mkdir(parents=True, exist_ok=True)
        if not folder and path.exists():
            path.open("ab").close()
        else:
            with contextlib.suppress(FileNotFoundError):
                os.lstat(inside / f"{path.name}{PARTIAL}")  # is it a name?
            tempfile.TemporaryFile(dir=inside).close()
    except FileExistsError:
        raise UserError(f"{path}: cannot be written: Not a directory; set {option}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be written: {reason}; set {option}") from None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file where what is inside cannot write it.

    Raises:
      OutputError: an error of the operating system, whichever library reports it.
    """
    try:
        yield
    except (OutputError, UserError):
        raise
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        raise OutputError(
            f"{path}: cannot be written: {reason}; everything written before is kept, and the "
            "same command resumes from it"
        ) from error


def _reason(error: BaseException) -> str | None:
    """What the operating system objects to; None where it is not the cause of an error."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or os.strerror(error.errno)
    found = OS_ERROR.search(str(error))
    return None if found is None else os.strerror(int(found[1]))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write instead of `path`, which it replaces once it is whole and on disk.

    A kill, an error or a full disk leaves what was there before. A device is written directly.
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
            if scratch.is_file():
                with scratch.open("rb") as file:
                    os.fsync(file.fileno())
            scratch.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                remove(scratch)
            raise


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """As `write_text`, a value as JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """As `write_text`, one value as JSON per line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def json_value(value: Any) -> Any:
    """The value as JSON can hold it: null for NaN and infinities, in lists and objects too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: json_value(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(one) for one in value]
    return value


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file that a command has written.

    Args:
      path: of the file.
      what: the file is, for the message.

    Raises:
      UserError: it cannot be read, or holds something else.
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
    """As `write_text`, arrays by name in an .npz file."""
    with replacing(path) as scratch, scratch.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType] (a flag of savez)


def read_arrays(
    path: Path, names: Sequence[str], *, optional: Sequence[str] = ()
) -> dict[str, np.ndarray] | None:
    """The arrays that `write_arrays` kept of what can be recomputed.

    Args:
      path: of the file.
      names: of the arrays.
      optional: more names, of those that may be missing.

    Returns:
      None where there is no such file, or where it is damaged, which is said in a line on
      standard error.
    """
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            there = [name for name in optional if name in stored]
            return {name: stored[name] for name in (*names, *there)}
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
        notice(f"{path}: damaged ({error}), and is recomputed")
        return None


class _NamedFile(io.FileIO):
    """A file whose errors name it."""

    def write(self, data: Any) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        with writing(Path(str(self.name))):
            return super().write(data)


def open_bytes(path: Path, mode: Literal["w", "a"]) -> io.BufferedWriter:
    """Open a file for writing as it comes; its errors name it, at a `write` or a `flush`."""
    with writing(path):
        return io.BufferedWriter(_NamedFile(path, mode))


def open_text(path: Path, mode: Literal["w", "a"]) -> io.TextIOWrapper:
    """As `open_bytes`, in UTF-8."""
    return io.TextIOWrapper(open_bytes(path, mode), encoding="utf-8", newline="\n")


@contextlib.contextmanager
def locked(output: Path, option: str, *, folder: bool = False) -> Iterator[None]:
    """Keep a second command from writing an output for the time of a `with`; a kill lets go, too.

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
            notice(f"{path}: no lock here ({error.strerror}); start no second")
        else:
            file.truncate(0)
            with writing(path):
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
        yield


def digest(path: Path) -> str:
    """The SHA-256 of a file's content; about 2 GB/s where the processor helps."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(root: Path, files: Iterable[Path]) -> dict[str, str]:
    """The SHA-256 of files, by their names below a folder."""
    files = sorted(files)
    with ThreadPoolExecutor(4) as pool:  # hashing lets go of Python's lock
        found = list(pool.map(digest, files))
    return {str(file.relative_to(root)): one for file, one in zip(files, found, strict=True)}
