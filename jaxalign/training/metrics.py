"""Means that survive padding, micro-batches and devices, and the writers that record them."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxalign.errors import UserError, notice
from jaxalign.files import json_value, open_text, write_json_lines, writing
from jaxalign.records import AnyArray, record


@record
class Mean:
    """A weighted mean as its sum and its weight, so that the means of parts add up exactly."""

    total: Float[AnyArray, ""]
    count: Float[AnyArray, ""]

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(total=self.total + other.total, count=self.count + other.count)

    def value(self) -> Any:
        """The mean; NaN if the weight is 0, as of a label that a batch lacks."""
        with np.errstate(invalid="ignore"):
            return self.total / self.count


def mean_of(values: Float[Array, " n"], weights: Float[Array, " n"]) -> Mean:
    """The weighted mean of values; entries of weight 0 are ignored, even if NaN."""
    kept = jnp.where(weights > 0, values, 0.0)
    return Mean(total=jnp.sum(kept * weights), count=jnp.sum(weights))


def add_means(a: Mapping[str, Mean], b: Mapping[str, Mean]) -> dict[str, Mean]:
    """The sum of two sets of means, by name."""
    return {name: a[name] + b[name] for name in a}


def to_floats(means: Mapping[str, Any]) -> dict[str, float]:
    """Each mean and each scalar as a float."""
    return {
        name: float(value.value() if isinstance(value, Mean) else value)
        for name, value in means.items()
    }


@runtime_checkable
class Writer(Protocol):
    """Destination of the metrics of each step."""

    def write(self, stage: str, split: str, step: int, values: Mapping[str, float | int]) -> None:
        """Record the metrics of one step of one stage."""
        ...

    def flush(self) -> None:
        """Make what was written permanent; called with every checkpoint."""
        ...

    def close(self) -> None:
        """Write what is buffered and close."""
        ...


class JsonLines:
    """`metrics.jsonl`: one object per line, with stage, split and step first."""

    def __init__(self, path: Path):
        self._path = path
        self._file = open_text(path, "a")

    def write(self, stage: str, split: str, step: int, values: Mapping[str, float | int]) -> None:
        line = {"stage": stage, "split": split, "step": step}
        self._file.write(json.dumps(json_value(line | dict(values))) + "\n")
        self._file.flush()

    def flush(self) -> None:
        self._file.close()  # a mounted bucket stores a file when it is closed
        self._file = open_text(self._path, "a")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """TensorBoard events, one folder per stage.

    Args:
      folder: parent of the stages' folders.
      keep: the last step of each stage that is kept from an earlier command; later steps are
        rewritten, and TensorBoard hides their earlier events.
    """

    def __init__(self, folder: Path, keep: Mapping[str, int]):
        self._folder, self._keep = folder, keep
        self._writers: dict[str, Any] = {}

    def _open(self, stage: str) -> Any:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import (
            Event,  # pyright: ignore[reportAttributeAccessIssue] (made when it is imported)
            SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
        )

        folder = self._folder / stage
        folder.mkdir(parents=True, exist_ok=True)
        earlier = len(list(folder.iterdir()))
        writer = EventsWriter(str(folder / "events"), f".{earlier}")
        if earlier:
            start = SessionLog(status=SessionLog.START)
            purged = self._keep.get(stage, -1) + 1
            writer.write_event(Event(wall_time=time.time(), step=purged, session_log=start))
        return writer

    def write(self, stage: str, split: str, step: int, values: Mapping[str, float | int]) -> None:
        from tensorboardX.proto.event_pb2 import (
            Event,  # pyright: ignore[reportAttributeAccessIssue] (made when it is imported)
        )
        from tensorboardX.summary import scalar

        with writing(self._folder):
            if stage not in self._writers:
                self._writers[stage] = self._open(stage)
            for name, value in values.items():
                summary = scalar(f"{stage}-{split}/{name}", value)
                event = Event(wall_time=time.time(), step=step, summary=summary)
                self._writers[stage].write_event(event)

    def flush(self) -> None:
        with writing(self._folder):
            for writer in self._writers.values():
                writer.flush()

    def close(self) -> None:
        with writing(self._folder):
            for writer in self._writers.values():
                writer.close()


class WeightsAndBiases:
    """A Weights & Biases run, through the extra `wandb`."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any], folder: Path):
        try:
            import wandb  # pyright: ignore[reportMissingImports] (an extra)
        except ModuleNotFoundError as error:
            raise UserError(
                'wandb_project: wandb is not installed; pip install "jaxalign[wandb]"'
            ) from error
        self._run = wandb.init(project=project, name=name, config=dict(config), dir=str(folder))

    def write(self, stage: str, split: str, step: int, values: Mapping[str, float | int]) -> None:
        self._run.log({f"{stage}-{split}/{k}": v for k, v in values.items()} | {"step": step})

    def flush(self) -> None:
        """Does nothing: wandb sends by itself."""

    def close(self) -> None:
        self._run.finish()


def parse_metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of a metrics file, and an error message for each line that cannot be used.

    A truncated last line, left by a killed process, is ignored.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    lines, faults = [], []
    for number, line in enumerate(raw.split(b"\n"), start=1):
        try:
            value = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            fault = "not JSON"
        else:
            fault = _fault(value)
            if fault is None:
                lines.append(value)
                continue
        if raw.count(b"\n") >= number:  # else it is the truncated last line
            faults.append(f"{path}:{number}: {fault}")
    return lines, faults


def _fault(value: Any) -> str | None:
    """Why a value is not a line of a metrics file; None: it is one."""
    if not isinstance(value, dict):
        return f"a {type(value).__name__}, not an object"
    for name, kind in (("stage", str), ("split", str), ("step", int)):
        if not isinstance(value.get(name), kind) or isinstance(value.get(name), bool):
            return f"no {name}" if name not in value else f"{name} is {value[name]!r}"
    for name, number in value.items():
        if name not in ("stage", "split") and not isinstance(number, int | float | None):
            return f"{name} is not a number"
    return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without a truncated last line.

    Raises:
      UserError: another line cannot be used; names the first one.
    """
    lines, faults = parse_metrics(path)
    if faults:
        raise UserError(f"{faults[0]}; restore the line, or remove it")
    return lines


def rewind(path: Path, keep: Mapping[str, int]) -> None:
    """Drop the lines after a given step of each stage, so that a resumed run rewrites them.

    Args:
      path: a metrics file; it may be missing if there is nothing to keep.
      keep: the last step to keep of each stage; the lines of other stages are dropped.

    Raises:
      UserError: a line cannot be used, or the file is missing and there are steps to keep.
    """
    if not path.exists():
        if keep:
            raise UserError(
                f"{path}: missing, and there are checkpoints of {', '.join(keep)}; restore it, or "
                "create an empty file to resume without the earlier metrics"
            )
        return
    lines = read_metrics(path)
    kept = [line for line in lines if line["step"] <= keep.get(line["stage"], -1)]
    for stage, step in keep.items():
        last = max((line["step"] for line in kept if line["stage"] == stage), default=0)
        if last < step:
            notice(f"{path}: lacks {stage} steps {last + 1} to {step}")
    write_json_lines(path, kept)
