"""Worker processes: work that is done in parts, on all cores."""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jaxalign.errors import OutputError, UserError, leave_notices_to

Part = TypeVar("Part")

MOST = 16
"""Largest number of worker processes: each holds the libraries and the tokenizer in memory."""


def spread(
    work: Callable[[Part], None],
    parts: Sequence[Part],
    *,
    workers: int | None = None,
    done: Callable[[int], None] = lambda _: None,
) -> None:
    """Do the parts of a piece of work in worker processes; a single part in this process.

    The workers are new Python processes that import the function's module and nothing of the
    caller's script; they leave accelerators alone.

    Args:
      work: does a part; pickled: a function of a module, or a `functools.partial` of one.
      parts: pickled one by one.
      workers: largest number of processes; None: one for each core, at most `MOST`.
      done: called with the number of parts that are done.

    Raises:
      UserError: of the first part, in their order, that raised one.
      RuntimeError: a part raised another error, or a worker was killed.
    """
    most = min(MOST, len(os.sched_getaffinity(0))) if workers is None else workers
    number = min(most, len(parts))
    if number < 2:
        for count, part in enumerate(parts, start=1):
            work(part)
            done(count)
        return
    with contextlib.ExitStack() as stack:
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(number):
            worker = _Worker(work)
            stack.callback(worker.close)
            idle.put(worker)

        def do(part: Part) -> None:
            worker = idle.get()
            try:
                worker.do(part)
            finally:
                idle.put(worker)

        pool = ThreadPoolExecutor(number)
        stack.callback(pool.shutdown, cancel_futures=True)  # before the workers are closed
        futures = [pool.submit(do, part) for part in parts]
        for count, future in enumerate(futures, start=1):
            future.result()
            done(count)


class _Worker:
    """A process that does parts until its standard input ends."""

    def __init__(self, work: Callable[[Any], None]):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TOKENIZERS_PARALLELISM": "false",  # one thread: there is a worker for each core
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from jaxalign.data.workers import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._work: Callable[[Any], None] | None = work

    def do(self, part: Any) -> None:
        """Wait for a part to be done; raises what it raised."""
        tasks, answers = self._process.stdin, self._process.stdout
        assert tasks is not None
        assert answers is not None
        try:
            if self._work is not None:
                pickle.dump(self._work, tasks)
                self._work = None
            pickle.dump(part, tasks)
            tasks.flush()
            error = pickle.load(answers)
        except (EOFError, BrokenPipeError):
            raise RuntimeError(
                f"a worker process ended with status {self._process.wait()} (-9: killed, perhaps "
                "for lack of memory); run the same command again to resume"
            ) from None
        if error is not None:
            raise error

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._process.wait()


def serve() -> None:
    """Do parts from standard input, and answer with None or an error on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    leave_notices_to("the process that started this one")
    tasks, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may be written between the answers
    work = pickle.load(tasks)
    while True:
        try:
            part = pickle.load(tasks)
        except EOFError:
            return
        error: Exception | None = None
        try:
            work(part)
        except (UserError, OutputError) as found:
            error = found
        except Exception:  # its class may not be known to the parent
            error = RuntimeError(f"in a worker process:\n{traceback.format_exc()}")
        pickle.dump(error, answers)
        answers.flush()
