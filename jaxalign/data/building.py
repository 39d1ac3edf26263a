"""Folders of derived data that the processes of a run build together, once for all later runs."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from jaxalign.data.workers import spread
from jaxalign.files import PARTIAL, locked, remove, writing
from jaxalign.progress import Progress

FORMAT = 1
"""Version of the files; part of every key."""
CACHE = ".cache"
"""Folder of these folders in the output folder; runs cannot take its place in lists."""
KEY = 16
"""Bytes of a key."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a run, which share a file system; by default a single one."""

    index: int = 0
    """Of this process."""
    count: int = 1
    first: Callable[[np.ndarray], np.ndarray] = lambda value: value
    """The value that process 0 has; all processes call it."""
    meet: Callable[[str], None] = lambda name: None
    """Wait until all processes are here; the name says where."""


ALONE = Processes()


class InFile(Protocol):
    """A part of the work."""

    @property
    def path(self) -> Path:
        """The file that is written when the part is done, atomically."""
        ...


P = TypeVar("P", bound=InFile)


def key_of(*facts: Any) -> bytes:
    """A hash of JSON values and of the versions of everything that reads and tokenises."""
    versions = {name: _version(name) for name in ("jaxalign", "transformers", "tokenizers")}
    text = json.dumps([FORMAT, versions, *facts], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).digest()[:KEY]


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def name_of(function: Callable[..., Any]) -> Any:
    """A function, or a `functools.partial` of one, as a JSON value for a key."""
    if (inner := getattr(function, "func", None)) is not None:
        partial: Any = function
        named = {name: _text(value) for name, value in partial.keywords.items()}
        return [name_of(inner), [_text(value) for value in partial.args], named]
    return f"{function.__module__}.{function.__qualname__}"


def _text(value: Any) -> Any:
    return name_of(value) if callable(value) else repr(value)


def built(
    cache: Path,
    label: str,
    key: bytes,
    *,
    prepare: Callable[[Path], None] = lambda folder: None,
    parts: Callable[[Path], Sequence[P]],
    work: Callable[[P], None],
    merge: Callable[[Path, Sequence[P]], None],
    what: str,
    processes: Processes,
    workers: int | None = None,
) -> Path:
    """The folder of a key, built if it is not there.

    Part i is done by process i mod `processes.count`, each in worker processes. The folder gets its
    name when it is complete. After a kill, the parts that were done are not done again.

    Args:
      cache: the folder of these folders.
      label: beginning of the folder's name.
      key: of everything that the content depends on; that of process 0 counts.
      prepare: (folder) done by process 0 before the parts are listed; after a kill again.
      parts: (folder) -> the parts, the same in every process.
      work: does a part, in a worker process: writes its file.
      merge: (folder, parts) done by process 0 when the parts are done; their files are removed.
      what: is done, for the progress.
      processes: of the run.
      workers: of `spread`.
    """
    key = processes.first(np.frombuffer(key, np.uint8)).tobytes()
    folder = cache / f"{label}-{key.hex()}"
    if processes.first(np.asarray(folder.is_dir())):
        return folder
    scratch = folder.with_name(f"{folder.name}{PARTIAL}")
    with contextlib.ExitStack() as stack:
        if not processes.index:
            with writing(cache):
                cache.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder, "--output"))
        if processes.first(np.asarray(folder.is_dir())):  # another run has just completed it
            return folder
        if not processes.index:
            with writing(scratch):
                scratch.mkdir(exist_ok=True)
            prepare(scratch)
        processes.meet(f"{folder.name} prepared")
        every = parts(scratch)
        mine = [one for one in every[processes.index :: processes.count] if not one.path.exists()]
        with Progress(what, len(mine), unit="part") as progress:
            spread(work, mine, workers=workers, done=progress)
        processes.meet(f"{folder.name} parts")
        if not processes.index:
            merge(scratch, every)
            for one in every:
                remove(one.path)
            with writing(folder):
                scratch.replace(folder)
        processes.meet(f"{folder.name} complete")
    return folder
