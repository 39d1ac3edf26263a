"""`--packing auto`: chosen once per run by the positions it saves, and stored in its folder."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxalign.data import TokenizedPairs
from jaxalign.data.batches import padded_positions
from jaxalign.data.packing import Packing, pair_packer
from jaxalign.errors import UserError
from jaxalign.files import read_json, write_json
from jaxalign.models import DecoderConfig
from jaxalign.stages.inputs import TokenizedData
from jaxalign.stages.kind import RunContext
from jaxalign.stages.models import stage_folder
from jaxalign.training.checkpoints import newest_step
from jaxalign.training.stage import Stage

PACKING = "packing.json"
"""File in the run folder with the choice of each stage."""
CHOICES = ("padded", "packed")
SAVED = 0.1
"""Fraction of the positions that packing must save."""


def with_packing(context: RunContext, stage: Stage) -> RunContext:
    """The same run, with the pairs of a stage packed if that is configured or saves work.

    Raises:
      UserError: the model's pairs cannot be packed, but `packing` is "always".
    """
    data = context.data[stage.name]
    assert isinstance(data, TokenizedData)
    shards = context.mesh.shape["data"] * context.mesh.shape["fsdp"]
    packing = Packing(shards=shards, micro_batches=stage.micro_batches)
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


def _chosen(context: RunContext, stage: Stage, data: TokenizedData, packing: Packing) -> bool:
    """Choose and print the choice."""
    config, settings = context.config, context.config.preference.packing
    is_decoder = isinstance(context.model_config, DecoderConfig)
    fits = stage.batch_size % packing.rows == 0
    if settings == "always" and not is_decoder:
        raise UserError(
            f"packing: the pairs of {config.model}, an encoder-decoder, cannot be packed; "
            "set --packing auto"
        )
    if settings == "always" and not fits:
        raise UserError(
            f"packing: a batch of {stage.batch_size} pairs cannot be shared equally by "
            f"{packing.rows} rows, one for each micro-batch of each device; set --packing auto"
        )
    if settings == "never" or not is_decoder or not fits or not len(data.train):
        return False
    if newest_step(stage_folder(context.folder, stage.name)) is not None:
        return False  # begun by a version that did not pack: its order of batches is another
    statistics = config.preference.entanglement
    watched = 0 < statistics.every < 4 or 0 < statistics.ledger < 4
    if settings == "auto" and (watched or jax.default_backend() != "cpu"):
        return False
    assert isinstance(data.train, TokenizedPairs)
    how: dict[str, Any] = {"batch_size": stage.batch_size, "seed": config.seed}
    shape = pair_packer(data.train, packing, **how).shape
    assert shape is not None  # the rows share a batch equally
    saved = 1 - packing.rows * shape.length / padded_positions(
        data.train, joint_share=data.joint_share, **how
    )
    if settings == "auto" and saved < SAVED:
        return False
    print(
        f"{stage.name}: pairs packed in {packing.rows} x {shape.length:,} tokens, "
        f"{saved:.0%} less than padded"
    )
    return True
