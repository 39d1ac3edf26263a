"""Means that survive padding, micro-batches and devices, and the writers that record them."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.errors import UserError
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


def _plain(value: float | int) -> float | int | None:
    """JSON has no NaN or infinity: null stands for them."""
    return value if math.isfinite(value) else None


class JsonLines:
    """`metrics.jsonl`: one object a line, with stage, split and step first."""

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, stage: str, split: str, step: int, values: Mapping[str, float | int]) -> None:
        line = {"stage": stage, "split": split, "step": step}
        line |= {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def flush(self) -> None:
        self._file.close()  # a mounted bucket takes a file when it is closed
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """TensorBoard events in the folder `tensorboard`."""

    def __init__(self, folder: Path):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, stage: str, split: str, step: int, values: Mapping[str, float | int]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{stage}-{split}/{name}", value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a kill cut short is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def rewind(path: Path, keep: Mapping[str, int]) -> None:
    """Drop the lines after each stage's step, so that a resumed run writes them anew.

    Args:
      path: a metrics file; nothing happens where there is none.
      keep: the last step to keep of each stage; stages not named are dropped whole.
    """
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= keep.get(line["stage"], -1)]
    scratch = path.with_suffix(".partial")
    scratch.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(scratch, path)
