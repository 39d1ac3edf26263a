"""`--remat auto`: decided by memory once in a run, and kept in its folder for those who resume."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxalign.commands.drive import World
from jaxalign.commands.planning.batches import largest_batch
from jaxalign.commands.planning.steps import Shapes, shapes_of
from jaxalign.commands.updates import make_objective, make_policy
from jaxalign.config import TrainConfig
from jaxalign.data import TokenizedPairs, TokenizedRows
from jaxalign.files import read_json, write_json
from jaxalign.training.memory import CHOICES, choose, free_memory, in_words, saved_bytes
from jaxalign.training.planning import bytes_on_device, placed_parameters

REMAT = "remat.json"
"""What was decided, by stage."""


def with_remat(world: World, name: str) -> World:
    """The same run with `remat` decided for a stage, by process 0 or by an earlier command."""
    if world.config.remat != "auto":
        return world
    choice = 0
    if jax.process_index() == 0:
        path = world.folder / REMAT
        kept = read_json(path, "list of decisions") if path.exists() else {}
        if kept.get(name) not in CHOICES:
            kept[name] = _decided(world, name)
            write_json(path, kept)
        choice = CHOICES.index(kept[name])
    if jax.process_count() > 1:
        choice = int(multihost_utils.broadcast_one_to_all(np.asarray(choice)))
    return dataclasses.replace(
        world, config=dataclasses.replace(world.config, remat=CHOICES[choice])
    )


def _decided(world: World, name: str) -> str:
    """The choice, said in one line."""
    config = at_real_lengths(world.config, world.data[name])
    shapes = shapes_of(config, name, world.model_config)
    free = free_memory(jax.local_devices()[0])
    needed = functools.partial(activations, config, name, world.model_config, shapes, world.mesh)
    choice, size = choose(needed, other_bytes(shapes, world.mesh), free)
    room = "unknown memory" if free is None else f"{in_words(free)} free"
    print(f"{name}: remat {choice}: activations about {in_words(size)} of {room}")
    return choice


def at_real_lengths(config: TrainConfig, data: Any) -> TrainConfig:
    """The config with rows no longer than the longest of the data."""
    train = getattr(data, "train", None)
    if not isinstance(train, TokenizedPairs | TokenizedRows) or not len(train):
        return config
    longest = min(config.max_length, int(np.max(train.length)))
    return dataclasses.replace(config, max_length=max(longest, 2))


def activations(
    config: TrainConfig, name: str, model_config: Any, shapes: Shapes, mesh: Mesh, remat: str
) -> float:
    """Bytes on a device that a step keeps for its backward pass, and that a layer needs in it.

    Args:
      config: of the run.
      name: the stage's.
      model_config: the architecture.
      shapes: of the stage's parameters.
      mesh: how devices share the rows and positions of a batch.
      remat: one of `CHOICES`.
    """
    kept = _saved(config, name, model_config, shapes, remat)
    if remat != "none":  # a layer at a time is recomputed whole
        layers = getattr(model_config, "layers", None) or model_config.decoder_layers
        kept += max(_saved(config, name, model_config, shapes, "none") - kept, 0) / layers
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["sequence"]
    return kept / parts


def _saved(config: TrainConfig, name: str, model_config: Any, shapes: Shapes, remat: str) -> int:
    config = dataclasses.replace(config, remat=remat)
    objective = make_objective(config, name, make_policy(config, name, model_config))
    batch, _ = largest_batch(config, name, objective, platform=jax.default_backend())
    parts = getattr(config, name).micro_batches
    if name == "online":
        parts *= objective.algorithm.minibatches
    return saved_bytes(objective, shapes.state.params, shapes.frozen, batch, micro_batches=parts)


def other_bytes(shapes: Shapes, mesh: Mesh) -> int:
    """Bytes on a device that a stage will take beside its parameters and activations.

    Gradients, updates, the optimiser's state, and a reference of its own.
    """
    trained, state, reference = (
        bytes_on_device(placed_parameters(tree, mesh))
        for tree in (shapes.state.params, shapes.state.opt_state, shapes.frozen["reference"])
    )
    return 2 * trained + state + reference
