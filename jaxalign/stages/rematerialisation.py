"""`--remat auto`: decided by memory once in a run, and kept in its folder for resuming."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxalign.config import TrainConfig
from jaxalign.data import TokenizedPairs, TokenizedRows
from jaxalign.files import read_json, write_json
from jaxalign.sharding.structs import bytes_on_device, placed_parameters
from jaxalign.stages.kind import Kind, RunContext
from jaxalign.stages.shapes import Shapes, shapes_of
from jaxalign.training.memory import CHOICES, choose, free_memory, in_words, saved_bytes

REMAT = "remat.json"
"""What was decided, by stage."""


def with_remat(kind: Kind, context: RunContext) -> RunContext:
    """The same run with `remat` decided for a stage, by process 0 or by an earlier command."""
    if context.config.remat != "auto":
        return context
    choice = 0
    if jax.process_index() == 0:
        path = context.folder / REMAT
        kept = read_json(path, "list of decisions") if path.exists() else {}
        if kept.get(kind.name) not in CHOICES:
            kept[kind.name] = _decided(kind, context)
            write_json(path, kept)
        choice = CHOICES.index(kept[kind.name])
    if jax.process_count() > 1:
        choice = int(multihost_utils.broadcast_one_to_all(np.asarray(choice)))
    config = dataclasses.replace(context.config, remat=CHOICES[choice])
    return dataclasses.replace(context, config=config)


def _decided(kind: Kind, context: RunContext) -> str:
    """The choice; one line names it."""
    config = at_real_lengths(context.config, context.data[kind.name])
    free = free_memory(jax.local_devices()[0])
    choice, size = choose_remat(
        kind,
        config,
        context.model_config,
        shapes_of(kind.build(config, context.model_config), context.model_config),
        context.mesh,
        platform=jax.default_backend(),
        free=free,
    )
    available = "unknown memory" if free is None else f"{in_words(free)} free"
    print(f"{kind.name}: remat {choice}: activations about {in_words(size)} of {available}")
    return choice


def at_real_lengths(config: TrainConfig, data: Any) -> TrainConfig:
    """The config with rows no longer than the longest of the data."""
    train = getattr(data, "train", None)
    if not isinstance(train, TokenizedPairs | TokenizedRows) or not len(train):
        return config
    longest = min(config.max_length, int(np.max(train.length)))
    return dataclasses.replace(config, max_length=max(longest, 2))


def choose_remat(
    kind: Kind,
    config: TrainConfig,
    model_config: Any,
    shapes: Shapes,
    mesh: Mesh,
    *,
    platform: str,
    free: int | None,
) -> tuple[str, float]:
    """The fastest way to rematerialise a stage that fits, and its bytes of activations.

    Args:
      kind: of the stage.
      config: of the run.
      model_config: the architecture.
      shapes: of the stage.
      mesh: how devices share the work.
      platform: that the step is for.
      free: bytes that are free on a device beside the parameters; None: not known.
    """

    def saved(remat: str) -> int:
        stage = kind.build(dataclasses.replace(config, remat=remat), model_config)
        batch, _ = stage.largest_batch(platform, None)
        trained, frozen = shapes.state.params, shapes.frozen
        return saved_bytes(stage.objective, trained, frozen, batch, micro_batches=stage.parts)

    def activations(remat: str) -> float:
        """Bytes on a device that a step keeps, and that a layer needs in its backward pass."""
        kept: float = saved(remat)
        if remat != "none":  # a layer at a time is recomputed whole
            layers = getattr(model_config, "layers", None) or model_config.decoder_layers
            kept += max(saved("none") - kept, 0) / layers
        return kept / (mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["sequence"])

    return choose(activations, _other_bytes(shapes, mesh), free, platform=platform)


def _other_bytes(shapes: Shapes, mesh: Mesh) -> int:
    """Bytes on a device that a stage takes beside its parameters and activations.

    Gradients, updates, the optimiser's state, and a reference of its own.
    """
    trained, moments, reference = (
        bytes_on_device(placed_parameters(tree, mesh))
        for tree in (shapes.state.params, shapes.state.opt_state, shapes.frozen["reference"])
    )
    return 2 * trained + moments + reference
