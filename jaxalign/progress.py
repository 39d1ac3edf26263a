"""Progress of a command: bars on a terminal, plain lines in a log file.

Both go to standard error. In a log file, work with items writes a line at least every 30 seconds
and one at its end; work without items (compiling, loading) writes a line if it takes longer than a
second. Of nested pieces of work, only the innermost writes.
"""

import functools
import io
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

EVERY = 30.0
"""Largest number of seconds between two lines."""
SLOW = 1.0
"""Seconds after which work without items writes a line."""
BEAT = 0.5
"""Seconds between two checks of the clock."""

Item = TypeVar("Item")
Result = TypeVar("Result")

_silent = threading.Event()
_active: list["Progress"] = []


def silence() -> None:
    """Write nothing from now on: process 0 writes for all."""
    _silent.set()


class Progress:
    """Context that shows the progress of a piece of work.

    Args:
      name: of the work, e.g. "answers" or, without items, "loading weights of gpt2".
      total: number of items; None: unknown.
      done: number of items finished by an earlier command.
      unit: word before the numbers, e.g. "step"; may be empty.
      stream: to write to; None: standard error.
      clock: function that returns seconds.
    """

    def __init__(
        self,
        name: str,
        total: int | None = None,
        *,
        done: int = 0,
        unit: str = "",
        stream: io.TextIOBase | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.name, self.total, self.done, self.unit, self.note = name, total, done, unit, ""
        self._stream: Any = sys.stderr if stream is None else stream
        self._clock = clock
        self._silent, self._owns_bar = _silent.is_set(), False
        self._bar: Any = None
        self._counted = total is not None
        self._started_with = self._written = done
        self._lines = 0
        self._end = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> "Progress":
        self._start = self._last = self._clock()
        self._first: tuple[float, int] | None = None
        if self._silent:
            return self
        if self._stream.isatty():
            self._begin_bar()
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        _active.append(self)
        return self

    def __call__(self, done: int, note: str = "") -> None:
        """Report the number of finished items.

        Args:
          done: number of finished items, including those of an earlier command.
          note: text to show, e.g. "loss 0.6931".
        """
        self.done, self.note, self._counted = done, note, True
        if self._first is None:  # the first item compiles, so the others determine the time left
            self._first = self._clock(), done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, numbers=self._numbers(), note=note)
        elif not self._silent:
            self.tick()

    def tick(self) -> None:
        """Write a line if one is due."""
        with self._lock:
            if self._silent or self._bar is not None or (_active and _active[-1] is not self):
                return
            first = not self._counted and not self._lines
            if self._clock() - self._last >= (SLOW if first else EVERY - 2 * BEAT):
                self._say()

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._silent:
            return
        _active.remove(self)
        if self._bar is not None:
            self._end_bar()
            return
        self._end.set()
        self._thread.join()
        finished = kind is None and self._counted and self.done > self._started_with
        if finished and not (self._lines and self._written == self.done):
            self._say(ended=True)
        if _active and self._lines:
            _active[-1]._last = max(_active[-1]._last, self._last)

    def _watch(self) -> None:
        while not self._end.wait(BEAT):
            self.tick()

    def _say(self, *, ended: bool = False) -> None:
        now = self._clock()
        text, parts = self.name, [part for part in (self._numbers(), self.note) if part]
        spent = _duration(now - self._start)
        if self._counted:
            parts.append(f"{spent} in all" if ended else f"{spent} so far")
            left = None if ended else self._left(now)
            parts += [] if left is None else [f"{_duration(left)} left"]
        elif self._lines:
            parts.append(f"{spent} so far")
        self._lines, self._last, self._written = self._lines + 1, now, self.done
        self._stream.write(": ".join([text, ", ".join(parts)] if parts else [text]) + "\n")
        self._stream.flush()

    def _numbers(self) -> str:
        if not self._counted:
            return ""
        numbers = f"{self.done:,}" + ("" if self.total is None else f" of {self.total:,}")
        return f"{self.unit} {numbers}".strip()

    def _left(self, now: float) -> float | None:
        """Estimated seconds for the rest, at the rate of the items since the first."""
        if self.total is None or self._first is None or self.done <= self._first[1]:
            return None
        per_item = (now - self._first[0]) / (self.done - self._first[1])
        return per_item * (self.total - self.done)

    def _begin_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = next((one._bar for one in _active if one._bar is not None), None)
        if self._bar is None:
            self._owns_bar = True
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[numbers]}"),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
                transient=self.total is None,
                redirect_stdout=sys.stdout.isatty(),  # not if it goes to a file
            )
            self._bar.start()
        self._task = self._bar.add_task(
            self.name, total=self.total, completed=self.done, numbers=self._numbers(), note=""
        )

    def _end_bar(self) -> None:
        if self._owns_bar:
            self._bar.stop()
        else:
            self._bar.remove_task(self._task)


def busy(what: str) -> Progress:
    """Context for work without items, e.g. "compiling the step"."""
    return Progress(what)


def saying(function: Callable[..., Result], describe: Callable[..., str]) -> Callable[..., Result]:
    """A compiled function that reports its compilation at the first call with each shape.

    Args:
      function: from `jax.jit`, compiled at its first call with each shape.
      describe: arguments of the function -> description of the program, including shapes.
    """
    known: set[str] = set()

    @functools.wraps(function)
    def called(*arguments: Any, **options: Any) -> Result:
        what = describe(*arguments, **options)
        if what in known:
            return function(*arguments, **options)
        with busy(f"compiling {what}"):
            result = function(*arguments, **options)
        known.add(what)
        return result

    return called


def track(
    items: Iterable[Item], name: str, total: int | None = None, *, unit: str = ""
) -> Iterator[Item]:
    """Iterate over items and show the progress.

    Args:
      items: to iterate over.
      name: of the work.
      total: number of items; None: their length, if they have one.
      unit: as in `Progress`.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(name, total, unit=unit) as progress:
        for number, item in enumerate(items, 1):
            yield item
            progress(number)


def _duration(seconds: float) -> str:
    """75 s -> 1:15; 3,700 s -> 1:01:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
