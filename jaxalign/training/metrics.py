"""Means that survive padding, micro-batches and devices, and the writers that record them."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.errors import UserError, notice
from jaxalign.files import json_value, open_text, write_json_lines, writing
from jaxalign.records import AnyArray, record


@record
class Mean:
    """A weighted mean kept as its sum and its weight, so that parts add up exactly."""

    total: Float[AnyArray, ""]
    count: Float[AnyArray, ""]

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(total=self.total + other.total, count=self.count + other.count)

    def value(self) -> Any:
        """The mean; NaN where nothing was counted."""
        return self.total / self.count


def mean_of(values: Float[Array, " n"], weights: Float[Array, " n"]) -> Mean:
    """The weighted mean of values, entries of weight 0 left out even where they are NaN."""
    kept = jnp.where(weights > 0, values, 0.0)
    return Mean(total=jnp.sum(kept * weights), count=jnp.sum(weights))


def add_means(a: Mapping[str, Mean], b: Mapping[str, Mean]) -> dict[str, Mean]:
    """Entry by entry."""
    return {name: a[name] + b[name] for name in a}


def to_floats(means: Mapping[str, Any]) -> dict[str, float]:
    """Numbers for people: each mean divided out, each scalar as a float."""
    return {
        name: float(value.value() if isinstance(value, Mean) else value)
        for name, value in means.items()
    }


@runtime_checkable
class Writer(Protocol):
    """Takes the numbers of one step."""

    def write(self, stage: str, split: str, step: int, values: Mapping[str, float | int]) -> None:
        """Record the values of one step of one stage."""
        ...

    def flush(self) -> None:
        """Leave what was written where it outlives this machine; called with every checkpoint."""
        ...

    def close(self) -> None:
        """Leave nothing in a buffer."""
        ...


class JsonLines:
    """`metrics.jsonl`: one object a line, with stage, split and step first."""

    def __init__(self, path: Path):
        self._path = path
        self._file = open_text(path, "a")

    def write(self, stage: str, split: str, step: int, values: Mapping[str, float | int]) -> None:
        line = {"stage": stage, "split": split, "step": step}
        self._file.write(json.dumps(json_value(line | dict(values))) + "\n")
        self._file.flush()

    def flush(self) -> None:
        self._file.close()  # a mounted bucket takes a file when it is closed
        self._file = open_text(self._path, "a")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """TensorBoard events, a folder of them for each stage.

    Args:
      folder: of the stages' folders.
      keep: the last step of each stage that an earlier command has written and this one keeps;
        what it wrote after that step is written again, and TensorBoard leaves out the former.
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
        """Nothing: the run sends by itself."""

    def close(self) -> None:
        self._run.finish()


def parse_metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of a metrics file, and what is wrong with each that cannot be used.

    A last line that a kill cut short is neither.

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
        if raw.count(b"\n") >= number:  # else it is what is behind the last line's end
            faults.append(f"{path}:{number}: {fault}")
    return lines, faults


def _fault(value: Any) -> str | None:
    """Why a value is no line of a metrics file."""
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
    """The lines of a metrics file; a last line that a kill cut short is left out.

    Raises:
      UserError: names the first other line that cannot be used.
    """
    lines, faults = parse_metrics(path)
    if faults:
        raise UserError(f"{faults[0]}; restore the line, or remove it to lose it")
    return lines


def rewind(path: Path, keep: Mapping[str, int]) -> None:
    """Drop the lines after each stage's step, so that a resumed run writes them again.

    Args:
      path: a metrics file; it may be missing where there is nothing to keep.
      keep: the last step to keep of each stage; stages not named are dropped whole.

    Raises:
      UserError: a line cannot be used, or the file is missing and there are steps to keep.
    """
    if not path.exists():
        if keep:
            raise UserError(
                f"{path}: missing, and there are checkpoints of {', '.join(keep)}; restore it, or "
                "make an empty file to continue without the earlier metrics"
            )
        return
    lines = read_metrics(path)
    kept = [line for line in lines if line["step"] <= keep.get(line["stage"], -1)]
    for stage, step in keep.items():
        last = max((line["step"] for line in kept if line["stage"] == stage), default=0)
        if last < step:
            notice(f"{path}: lacks {stage} steps {last + 1} to {step}")
    write_json_lines(path, kept)
