"""The cells of a study, shared by several processes: the first that is free takes the next one."""

import contextlib
import dataclasses
import fcntl
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.rows import Rows, models_of, same_options
from experiments.short_runs import Bench, Options, OutOfTime, write_splits
from jaxalign.models.devices import enable_compilation_cache

LEAST = 10.0
"""Seconds that must be left for a cell to be begun."""
WAIT = 1.0
"""Seconds between two looks at what others have finished."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A part of a study that one process does; it may write several rows."""

    study: str
    name: str
    """Also of the row that it writes last."""
    run: Callable[[Bench], None]
    after: str = ""
    """Name of the cell of the same study that must be done before; empty: none."""

    def done(self, rows: Path) -> bool:
        """Whether its last row is there."""
        return self.name in Rows(folder=rows / self.study)

    def ready(self, rows: Path) -> bool:
        """Whether what it needs is there."""
        return not self.after or self.after in Rows(folder=rows / self.study)


def work(cells: Sequence[Cell], bench: Bench) -> None:
    """Do cells in their order until none is left, or the time is over.

    A cell that fails is not tried again by any process; its traceback is kept.
    """
    rows, folder = bench.options.rows, bench.options.output / "cells"
    while bench.seconds_left > LEAST:
        left = [one for one in cells if not one.done(rows) and not _failure(folder, one).exists()]
        if not left:
            return
        for cell in left:
            if not cell.ready(rows):
                continue
            with claimed(_lock(folder, cell)) as mine:
                if not mine or cell.done(rows) or _failure(folder, cell).exists():
                    continue
                print(f"cell {cell.study}/{cell.name}", flush=True)
                _attempt(cell, bench, folder)
                break
        else:
            if not any(_is_claimed(_lock(folder, cell)) for cell in left):
                return  # what is left needs cells that failed
            time.sleep(WAIT)


def _attempt(cell: Cell, bench: Bench, folder: Path) -> None:
    """Do a cell that this process has claimed; a fault is written to a file."""
    begun, failure = _lock(folder, cell).with_suffix(".begun"), _failure(folder, cell)
    if begun.exists():  # the lock is free: the process that began it is gone
        failure.write_text("the process that ran it ended\n", encoding="utf-8")
        return
    begun.touch()
    try:
        cell.run(bench)
    except OutOfTime:
        pass
    except Exception:
        traceback.print_exc()
        failure.write_text(traceback.format_exc(), encoding="utf-8")
    begun.unlink()
    bench.forget_programs()


def run(cells: Sequence[Cell], options: Options, module: str) -> int:
    """Do cells in this process or, with `workers`, in several that it starts.

    Args:
      cells: in the order of their importance.
      options: of the studies.
      module: the command's, for the processes that it starts.

    Returns:
      The number of cells that are not done.
    """
    check_same(options)
    write_splits(options)
    folder = options.output / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    until = options.until
    if until is None:  # not a process of another one
        for path in (*folder.glob("*.failed"), *folder.glob("*.begun")):
            if not _is_claimed(path.with_suffix(".lock")):  # of another command that runs now
                path.unlink()
        if options.minutes is not None:
            until = time.time() + 60 * options.minutes
    chosen = [
        one
        for one in cells
        if not options.cells or f"{one.study}/{one.name}".startswith(options.cells)
    ]
    if options.workers == 1:
        enable_compilation_cache()
        work(chosen, Bench(options, until))
    else:
        _start(options, module, until)
    missing = [f"{one.study}/{one.name}" for one in chosen if not one.done(options.rows)]
    if missing and options.until is None:
        print(f"not done: {' '.join(missing)}; run the same command again to resume")
    for path in sorted(folder.glob("*.failed")) if options.until is None else ():
        print(f"failed: {path.stem}: {path.read_text(encoding='utf-8').splitlines()[-1]}")
    return len(missing)


def check_same(options: Options) -> None:
    """Check that the folder's rows were made with the same sizes; a new folder keeps these.

    Raises:
      UserError: they were not.
    """
    names = ("steps", "pairs", "max_length", "longest", "held_out", "dtype")
    own = models_of(model=options.model) | {name: getattr(options, name) for name in names}
    same_options(options.rows / "options.json", own)


def _start(options: Options, module: str, until: float | None) -> None:
    """Start the processes, and stop them when the time is over."""
    never = time.time() + 365 * 86400
    own = dataclasses.replace(options, workers=1, minutes=None, until=until or never)
    cache = options.output / "compiled"
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(cache.resolve()),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3",
        **os.environ,
    }
    command = [sys.executable, "-m", module, *arguments_of(own)]
    with contextlib.ExitStack() as stack:
        processes = []
        for number in range(options.workers):
            log = stack.enter_context(
                (options.output / f"worker_{number}.log").open("w", encoding="utf-8")
            )
            processes.append(
                subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            )
        try:
            while any(one.poll() is None for one in processes):
                if until is not None and time.time() > until:
                    break
                time.sleep(0.2)
        finally:
            for one in processes:
                one.kill()
                one.wait()


def arguments_of(options: Options) -> list[str]:
    """The flags that give these options."""
    flags = []
    for one in dataclasses.fields(options):
        value = getattr(options, one.name)
        if value is None or value == ():
            continue
        values = value if isinstance(value, tuple) else (value,)
        flags += [f"--{one.name.replace('_', '-')}", *map(str, values)]
    return flags


def _lock(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.study}_{cell.name}.lock"


def _failure(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.study}_{cell.name}.failed"


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Context that holds a lock file if nobody else does; the end of a process releases it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _is_claimed(path: Path) -> bool:
    with claimed(path) as free:
        return not free
