"""`packing: auto`: chosen once per run by the positions it saves, and stored in its folder."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxalign.data.packing import Packing
from jaxalign.errors import UserError
from jaxalign.files import read_json, write_json
from jaxalign.models import DecoderConfig
from jaxalign.sharding import row_parts
from jaxalign.stages.kind import RunContext
from jaxalign.stages.models import stage_folder
from jaxalign.training.checkpoints import newest_step
from jaxalign.training.stage import Stage

PACKING = "packing.json"
"""File in the run folder with the choice of each stage."""
CHOICES = ("padded", "packed")
SAVED = 0.1
"""Fraction of the positions that packing must save."""


@runtime_checkable
class PackableData(Protocol):
    """Data of a stage whose rows can be packed: a dataclass with the field `packing`."""

    packing: Packing | None
    """Rows of a packed training batch; None: padded."""

    def examples(self, seed: int) -> int:
        """Number of rows in an epoch."""
        ...

    def positions(self, packing: Packing | None, **order: Any) -> float:
        """Mean number of positions that the network computes for a training batch.

        Those of pairs take `apart`: whether each response has a prompt of its own.
        """
        ...


def with_packing(context: RunContext, stage: Stage) -> RunContext:
    """The same run, with the rows of a stage packed if that is configured or saves work.

    Raises:
      UserError: the stage's rows cannot be packed, but `packing` is "always".
    """
    data = context.data[stage.name]
    packing = Packing(
        shards=row_parts(context.mesh),
        micro_batches=stage.micro_batches,
        apart=_probe_interval(stage) > 0,
    )
    choice = 0
    if jax.process_index() == 0:
        path = context.folder / PACKING
        choices = read_json(path, "list of choices") if path.exists() else {}
        if choices.get(stage.name) not in CHOICES:
            choices[stage.name] = CHOICES[_chosen(context, stage, data, packing)]
            write_json(path, choices)
        choice = CHOICES.index(choices[stage.name])
    if jax.process_count() > 1:
        choice = int(multihost_utils.broadcast_one_to_all(np.asarray(choice)))
    if not choice:
        return context
    packed = dataclasses.replace(data, packing=packing)
    return dataclasses.replace(context, data={**context.data, stage.name: packed})


def check_batches_known(context: RunContext, stage: Stage) -> None:
    """Check that the stage was not begun by a version whose batches had another size.

    Before packing was a choice, a batch of responses was so many long rows of several responses.

    Raises:
      UserError: it was, and has steps left.
    """
    newest = newest_step(stage_folder(context.folder, stage.name))
    if newest is None or newest >= stage.steps or jax.process_index():
        return
    path = context.folder / PACKING
    if stage.name not in (read_json(path, "list of choices") if path.exists() else {}):
        raise UserError(
            f"{context.folder}: {stage.name} was begun by a version whose batches were of long "
            "rows, not of responses; set --name to start another run"
        )


def _is_measured() -> bool:
    """Whether packing is known to be faster on these devices: CPUs, one GPU."""
    platform = jax.default_backend()
    return platform == "cpu" or (platform == "gpu" and jax.device_count() == 1)


def _chosen(context: RunContext, stage: Stage, data: PackableData, packing: Packing) -> bool:
    """Choose and print the choice."""
    settings = getattr(context.config, stage.name).packing
    if settings == "never" or not data.examples(context.config.seed):
        return False
    if reason := _obstacle(context, stage, packing):
        if settings == "always":
            raise UserError(f"{stage.name}.packing: {reason}; set it to auto")
        print(f"{stage.name}: padded rows: {reason}")
        return False
    if newest_step(stage_folder(context.folder, stage.name)) is not None:
        return False  # begun by a version that did not pack: its order of batches is another
    if settings == "auto" and not _is_measured():
        return False
    how: dict[str, Any] = {"batch_size": stage.batch_size, "seed": context.config.seed}

    def mean(packing: Packing | None) -> float:
        """Positions of a batch, a fraction of which is probed: its responses have own prompts."""
        positions, every = data.positions(packing, **how), _probe_interval(stage)
        if not every:
            return positions
        return positions + (data.positions(packing, apart=True, **how) - positions) / every

    packed, saved = data.positions(packing, **how), 1 - mean(packing) / mean(None)
    if settings == "auto" and saved < SAVED:
        return False
    print(
        f"{stage.name}: {stage.rows.split(' of ')[0]} packed in {packing.rows} x "
        f"{packed / packing.rows:,.0f} tokens, {saved:.0%} less than padded"
    )
    return True


def _probe_interval(stage: Stage) -> int:
    """Steps from one with per-pair statistics to the next; 0: there are none."""
    return min((n for n in (stage.probe_every, stage.ledger_every) if n), default=0)


def _obstacle(context: RunContext, stage: Stage, packing: Packing) -> str:
    """Why the rows of a stage cannot be packed; empty: they can."""
    if not isinstance(context.model_config, DecoderConfig):
        return f"{context.config.model} is an encoder-decoder, whose rows cannot be packed"
    if context.model_config.experts is not None and _probe_interval(stage):
        return "the per-pair statistics of experts read padded rows"
    if stage.batch_size % packing.rows:
        return (
            f"a batch of {stage.batch_size} cannot be shared equally by {packing.rows} packed "
            "rows, one for each micro-batch of each device"
        )
    return ""
