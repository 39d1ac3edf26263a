"""`--remat auto`: decided by memory once in a run, and kept in its folder for those who resume."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxalign.commands.drive import World
from jaxalign.commands.planning.remat import choose_remat
from jaxalign.commands.planning.steps import shapes_of
from jaxalign.config import TrainConfig
from jaxalign.data import TokenizedPairs, TokenizedRows
from jaxalign.files import read_json, write_json
from jaxalign.training.memory import CHOICES, free_memory, in_words

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
    choice, size = choose_remat(
        config,
        name,
        world.model_config,
        shapes.state,
        shapes.frozen,
        world.mesh,
        platform=jax.default_backend(),
        free=free,
    )
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
