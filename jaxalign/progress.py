"""What a command says while it works: bars on a terminal, plain lines in a log file.

Both go to standard error. In a log file, work that counts its items says at least every 30 seconds
how far it is, and once at its end; work without items (compiling, loading) says what it does as
soon as it takes longer than a second. Inside of one another, the innermost one speaks.
"""

import functools
import io
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

EVERY = 30.0
"""Seconds between two lines, at most."""
SLOW = 1.0
"""Seconds before work without items says what it does."""
BEAT = 0.5
"""Seconds between two looks at the clock."""

Item = TypeVar("Item")
Result = TypeVar("Result")

_silent = threading.Event()
_active: list["Progress"] = []


def silence() -> None:
    """Say nothing from now on: process 0 speaks for the others."""
    _silent.set()


class Progress:
    """How far a piece of work is; a `with` begins and ends it.

    Args:
      name: of the work, "answers"; without a total what is done, "loading weights of gpt2".
      total: number of items; None: not known.
      done: items that an earlier command has finished.
      unit: word before the numbers, "step"; may be empty.
      stream: where to write; None: standard error.
      clock: seconds.
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
        self._started_with = self._said = done
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
        """So many items are done.

        Args:
          done: of the total, those of an earlier command among them.
          note: what else to show, "loss 0.6931".
        """
        self.done, self.note, self._counted = done, note, True
        if self._first is None:  # the first item compiles, so the time left is taken from the rest
            self._first = self._clock(), done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, numbers=self._numbers(), note=note)
        elif not self._silent:
            self.tick()

    def tick(self) -> None:
        """Write a line where one is due."""
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
        if finished and not (self._lines and self._said == self.done):
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
        self._lines, self._last, self._said = self._lines + 1, now, self.done
        self._stream.write(": ".join([text, ", ".join(parts)] if parts else [text]) + "\n")
        self._stream.flush()

    def _numbers(self) -> str:
        if not self._counted:
            return ""
        numbers = f"{self.done:,}" + ("" if self.total is None else f" of {self.total:,}")
        return f"{self.unit} {numbers}".strip()

    def _left(self, now: float) -> float | None:
        """Seconds that the rest will take at the pace of the items since the first."""
        if self.total is None or self._first is None or self.done <= self._first[1]:
            return None
        pace = (now - self._first[0]) / (self.done - self._first[1])
        return pace * (self.total - self.done)

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
                redirect_stdout=sys.stdout.isatty(),  # what goes into a file stays there
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
    """Work without items, for a `with` around it: "compiling the step"."""
    return Progress(what)


def saying(function: Callable[..., Result], describe: Callable[..., str]) -> Callable[..., Result]:
    """A compiled function that says what it compiles, at the first call with each shape.

    Args:
      function: made by `jax.jit`, which compiles in its first call with a shape.
      describe: its arguments -> what is compiled, the shape included.
    """
    known: set[str] = set()

    @functools.wraps(function)
    def called(*arguments: Any) -> Result:
        what = describe(*arguments)
        if what in known:
            return function(*arguments)
        with busy(f"compiling {what}"):
            result = function(*arguments)
        known.add(what)
        return result

    return called


def track(
    items: Iterable[Item], name: str, total: int | None = None, *, unit: str = ""
) -> Iterator[Item]:
    """The items, counted as they are done.

    Args:
      items: to go through.
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
