"""A profiler's trace of some steps of a stage."""

from pathlib import Path
from typing import Any

import jax


class Trace:
    """Context that traces `steps` steps into a folder, starting with step `first`.

    The folder then holds `plugins/profile/TIME/`: `perfetto_trace.json.gz` for ui.perfetto.dev and
    `*.xplane.pb` for xprof (`pip install xprof; xprof --logdir FOLDER`).
    """

    def __init__(self, folder: Path | None, *, first: int = 0, steps: int = 0):
        self._folder, self._first, self._last = folder, first, first + steps
        self._running = False

    def before(self, done: int, state: Any) -> None:
        """Start or stop the trace; call it before each step.

        Args:
          done: number of steps already made.
          state: of the step, to wait for.
        """
        if self._folder is None:
            return
        if self._first <= done < self._last and not self._running:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._running = True
        elif done >= self._last and self._running:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_) -> None:
        if self._running:
            self._stop()
