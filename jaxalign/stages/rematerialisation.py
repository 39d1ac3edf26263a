"""`--remat auto`: chosen by memory once per run, and stored in its folder for resuming."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxalign.config import TrainConfig
from jaxalign.data import TokenizedPairs, TokenizedRows
from jaxalign.files import read_json, write_json
from jaxalign.models.config import DecoderConfig, ModelConfig
from jaxalign.sharding import row_parts
from jaxalign.sharding.structs import bytes_on_device, placed_parameters
from jaxalign.stages.kind import Kind, RunContext
from jaxalign.stages.shapes import Shapes, shapes_of
from jaxalign.training.memory import CHOICES, choose, free_memory, in_words, saved_bytes

REMAT = "remat.json"
"""File in the run folder with the choice of each stage."""


def with_remat(kind: Kind, context: RunContext) -> RunContext:
    """The same run with `remat` chosen for a stage, by process 0 or by an earlier command."""
    if context.config.remat != "auto":
        return context
    choice = 0
    if jax.process_index() == 0:
        path = context.folder / REMAT
        choices = read_json(path, "list of choices") if path.exists() else {}
        if choices.get(kind.name) not in CHOICES:
            choices[kind.name] = _chosen(kind, context)
            write_json(path, choices)
        choice = CHOICES.index(choices[kind.name])
    if jax.process_count() > 1:
        choice = int(multihost_utils.broadcast_one_to_all(np.asarray(choice)))
    config = dataclasses.replace(context.config, remat=CHOICES[choice])
    return dataclasses.replace(context, config=config)


def _chosen(kind: Kind, context: RunContext) -> str:
    """Choose and print the choice."""
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
    """The config with `max_length` reduced to the longest row of the data."""
    train = getattr(data, "train", None)
    if not isinstance(train, TokenizedPairs | TokenizedRows) or not len(train):
        return config
    longest = min(config.max_length, int(np.max(train.length)))
    return dataclasses.replace(config, max_length=max(longest, 2))


def choose_remat(
    kind: Kind,
    config: TrainConfig,
    model_config: ModelConfig,
    shapes: Shapes,
    mesh: Mesh,
    *,
    platform: str,
    free: int | None,
) -> tuple[str, float]:
    """The fastest rematerialisation of a stage that fits, and its bytes of activations.

    Args:
      kind: of the stage.
      config: of the run.
      model_config: the architecture.
      shapes: of the stage.
      mesh: of the devices.
      platform: of the devices.
      free: free bytes of a device, without the parameters; None: unknown.
    """

    def saved(remat: str) -> int:
        stage = kind.build(dataclasses.replace(config, remat=remat), model_config)
        batch, _ = stage.largest_batch(platform, None)
        trained, frozen = shapes.state.params, shapes.frozen
        if stage.moving is not None:
            frozen = stage.moving.frozen(shapes.state.reference, frozen)
        return saved_bytes(stage.objective, trained, frozen, batch, micro_batches=stage.parts)

    def activations(remat: str) -> float:
        """Bytes on a device of what a step keeps and of the backward pass of one layer."""
        kept: float = saved(remat)
        if remat != "none":  # one layer at a time is recomputed
            layers = layers_of(model_config)
            kept += max(saved("none") - kept, 0) / layers
        return kept / (row_parts(mesh) * mesh.shape["sequence"])

    return choose(activations, _other_bytes(shapes, mesh), free, platform=platform)


def layers_of(model_config: ModelConfig) -> int:
    """The number of layers that the training step runs through, one after the other."""
    if isinstance(model_config, DecoderConfig):
        return model_config.layers
    return model_config.decoder_layers


def _other_bytes(shapes: Shapes, mesh: Mesh) -> int:
    """Bytes on a device of gradients, updates, optimiser state and frozen parameters.

    A reference counts although it may be the parameters themselves.
    """
    state, fixed = shapes.state, shapes.frozen
    if shapes.resident is not None:
        fixed = fixed["reference"]
    trained, moments, moving, frozen = (
        bytes_on_device(placed_parameters(tree, mesh))
        for tree in (state.params, state.opt_state, state.reference, fixed)
    )
    return 2 * trained + moments + moving + frozen
