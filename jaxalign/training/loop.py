"""The one loop: steps, evaluations, checkpoints and metrics of one stage of a run."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxalign.errors import UserError
from jaxalign.progress import busy
from jaxalign.sharding.processes import any_process
from jaxalign.training.checkpoints import Checkpoints
from jaxalign.training.metrics import Writer, to_floats
from jaxalign.training.profiling import Trace
from jaxalign.training.stage import Feed, Stage, Step
from jaxalign.training.step import RECORDS, TrainState, saved_fields


class Stopped(Exception):  # noqa: N818 (not an error: the user asked)
    """SIGTERM came; the state is saved."""


GRACE = 20.0
"""Seconds after SIGTERM within which the running step must end for its state to be saved."""
IDLE_GRACE = 2.0
"""The same where there is nothing to save, e.g. while the first step is compiled."""


_SIGTERM = threading.Event()


def stop_if_asked() -> None:
    """Stop within a long step, before it has changed any state.

    Several processes only stop together, between steps.

    Raises:
      Stopped: SIGTERM came.
    """
    if _SIGTERM.is_set() and jax.process_count() == 1:
        raise Stopped("stopped by SIGTERM")


class _Terminated:
    """Context that defers SIGTERM to the end of the step.

    The loop acts on it between steps. A thread ends the process if the loop does not get there in
    time (Python runs no signal handler while the main thread compiles or waits for a device), or at
    a second SIGTERM. Only unsaved progress is lost.

    Args:
      name: of the stage.
      committed: the newest step on disk.
    """

    def __init__(self, name: str, committed: Callable[[], int]):
        self.name, self.done, self.saved = name, 0, 0
        self._committed = committed

    @property
    def asked(self) -> bool:
        """Whether SIGTERM came."""
        return _SIGTERM.is_set()

    def __enter__(self):
        _SIGTERM.clear()
        try:
            self._before = signal.signal(signal.SIGTERM, self._remember)
        except ValueError:  # not the main thread: it gets no signals
            self._before = None
            return self
        self._end, write = os.pipe()
        os.set_blocking(write, False)
        self._wakeup = write, signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _remember(self, *_):
        _SIGTERM.set()

    def _watch(self) -> None:
        """Wait for SIGTERM; then end the process after a while or at a second SIGTERM."""
        if self._next_signal(None) == 0:
            return
        received = time.monotonic()
        while True:
            idle = self.done == self.saved and jax.process_count() == 1
            left = received + (IDLE_GRACE if idle else GRACE) - time.monotonic()
            number = self._next_signal(max(min(left, 0.1), 0.0))
            if number == 0:
                return
            if self._committed() < self.saved:  # wait for what is being written
                received = time.monotonic()
            if number == signal.SIGTERM or left <= 0:
                break
        sys.stderr.write(
            f"jaxalign train: {self.name}: stopped by SIGTERM after step {self.done}; saved up to "
            f"step {self._committed()}; run the same command again to resume\n"
        )
        sys.stderr.flush()
        os._exit(143)

    def _next_signal(self, timeout: float | None) -> int | None:
        """SIGTERM, 0 at the end of the context, None after the timeout."""
        while select.select([self._end], [], [], timeout)[0]:
            if (number := os.read(self._end, 1)[0]) in (0, signal.SIGTERM):
                return number
        return None

    def __exit__(self, *_):
        if self._before is None:
            return
        write, before = self._wakeup
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGTERM, self._before)
        os.write(write, b"\0")
        self._thread.join()
        os.close(write)
        os.close(self._end)


def run_stage(
    stage: Stage,
    feed: Feed,
    *,
    state: TrainState,
    frozen: Any,
    step: Callable[[int], Step],
    checkpoints: Checkpoints,
    writers: Sequence[Writer],
    nonfinite: str,
    progress: Callable[[int, Mapping[str, float]], None],
    trace: Trace | None = None,
) -> TrainState:
    """Train from the given state to the stage's last step.

    The host prepares and dispatches step n + 1 while the device runs step n, whose metrics are read
    one step late.

    Args:
      stage: to run.
      feed: its data.
      state: to start from; donated.
      frozen: what the step reads and never changes.
      step: number of updates made -> the compiled step of the next update.
      checkpoints: of the stage.
      writers: of metrics.
      nonfinite: "stop" or "skip".
      progress: called with the number and the metrics of each finished step.
      trace: profiler of some steps; None: no profile.

    Returns:
      The state after the last step.

    Raises:
      UserError: a loss or gradient was not finite and `nonfinite` is "stop", or none was finite.
      Stopped: SIGTERM came; everything is saved.
    """
    name, throughput, batches = stage.name, feed.throughput, feed.batches
    done = int(state.step)
    last_finish = time.perf_counter()
    stopping = False

    def write(split: str, at: int, values: Mapping[str, float]) -> None:
        for writer in writers:
            writer.write(name, split, at, values)

    def evaluate_at(at: int) -> None:
        if feed.evaluation is not None:
            with busy(f"{name}: evaluating on held-out data at step {at}"):
                values = feed.evaluation(state, frozen)
            write("eval", at, values)

    def save_state(at: int, position: Any) -> None:
        terminated.saved = at
        running = {name: float(value) for name, value in jax.device_get(state.running).items()}
        meta = {"iterator": position, "step": at, "stage": name, "running": running}
        checkpoints.save(at, saved_fields(state), meta)

    def save(at: int) -> None:
        save_state(at, batches.get_state())
        for writer in writers:
            writer.flush()

    def rescue(at: int, position: Any) -> None:
        """Save the state before a failed step: its samples and judgements may have cost money.

        Several processes do not fail together, so they cannot save together.
        """
        whole = not any(x.is_deleted() for x in jax.tree.leaves(state))
        if at and whole and jax.process_count() == 1:
            save_state(at, position)
            checkpoints.wait()

    def finish(at: int, pending: tuple[Any, Any]) -> None:
        """Read, check and record the metrics of a dispatched step."""
        nonlocal last_finish, stopping
        metrics, batch = pending
        metrics = jax.device_get(metrics)
        records = metrics.pop(RECORDS, None)
        values = to_floats(metrics)
        stopping = bool(values.pop("stopping"))
        now = time.perf_counter()
        seconds, last_finish = values.pop("seconds", now - last_finish), now
        finite = values.pop("finite")
        tokens, computed = int(values["tokens"]), values.pop("computed")
        rate = tokens / seconds
        values |= {
            "learning_rate": float(stage.schedule(at - 1)),
            "tokens": tokens,
            "tokens_per_second": rate,
        }
        if throughput.peak_flops is not None:
            flops = computed * throughput.flops_per_token
            values["mfu"] = flops / (seconds * throughput.peak_flops)
        if not finite and nonfinite == "stop":
            names = ", ".join(feed.describe(batch))
            advice = (
                "this is the first step, so the learning rate is not the cause: look at the "
                "initial weights, the loss and these records"
                if at == 1
                else "look at these records, lower the learning rate, or set --nonfinite skip"
            )
            raise UserError(
                f"{name} step {at}: loss {values['loss']:.6g}, gradient norm "
                f"{values['grad_norm']:.6g}: not finite, on records {names}; the update was "
                f"skipped; {advice}"
            )
        write("train", at, values)
        if records is not None and feed.record is not None:
            feed.record(at, records, batch)
        progress(at, values)

    terminated = _Terminated(name, checkpoints.committed)
    terminated.done = terminated.saved = done
    with terminated, trace or Trace(None) as trace:
        if done == 0:
            evaluate_at(0)
        pending = None
        last_finish = time.perf_counter()
        while done < stage.steps:
            trace.before(done, state)
            with jax.profiler.StepTraceAnnotation(name, step_num=done):
                position = batches.get_state()
                batch = next(batches)
                placed = feed.place(batch)
                counts = throughput.tokens(placed), throughput.computed(placed)
                try:
                    state, metrics = step(done)(state, frozen, placed)
                except (UserError, Stopped) as error:
                    if pending is not None:
                        finish(done, pending)
                    rescue(done, position)
                    if isinstance(error, Stopped):
                        saved = checkpoints.committed()
                        raise Stopped(f"{name}: {error} at step {saved}; it is saved") from None
                    raise
            done += 1
            terminated.done = done
            if pending is not None:
                finish(done - 1, pending)
            # all processes read the same flag at the same step, so they stop together
            stop = any_process(terminated.asked)
            more = {"tokens": counts[0], "computed": counts[1], "stopping": stop}
            pending = ({**more, **metrics}, batch)  # a step may count its tokens itself
            at_eval = done == stage.steps or (stage.eval_every and done % stage.eval_every == 0)
            at_save = done == stage.steps or (stage.save_every and done % stage.save_every == 0)
            if at_eval or at_save or stopping:
                finish(done, pending)
                pending = None
                if at_eval:
                    evaluate_at(done)
                if at_save or stopping:
                    save(done)
                if stopping:
                    checkpoints.wait()
                    raise Stopped(f"{name}: stopped by SIGTERM at step {done}; it is saved")
                last_finish = time.perf_counter()
        if pending is not None:
            finish(done, pending)
    checkpoints.wait()
    if stage.steps and int(state.skipped) >= stage.steps:
        raise UserError(
            f"{name}: none of the {stage.steps} updates was finite; all were skipped and nothing "
            "was learned; run with --nonfinite stop to see the records of the first one"
        )
    return state
