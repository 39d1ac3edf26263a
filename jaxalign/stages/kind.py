"""A kind of stage: how a config becomes a `Stage`, and a run's data its `Feed`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jax.sharding import Mesh

from jaxalign.config import LoraConfig, StageConfig, TrainConfig
from jaxalign.stages.inputs import Inputs
from jaxalign.training.metrics import Writer
from jaxalign.training.stage import Feed, Params, Stage


@runtime_checkable
class Examples(Protocol):
    """What a stage trains on."""

    def examples(self, seed: int) -> int:
        """Rows of an epoch."""
        ...


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What all stages of a run share."""

    config: TrainConfig
    folder: Path
    mesh: Mesh
    model_config: Any
    tokenizer: Any
    data: Mapping[str, Any]
    """What each stage reads, by its name."""
    writers: Sequence[Writer]


Outcome = tuple[Params, Params | None]
"""The parameters that a stage leaves and None; or the frozen ones and the trained adapters."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of stage. To add one: a module with such a value, and its entry in `KINDS`."""

    name: str
    """The field of `TrainConfig` that holds its steps, batch size and optimiser."""
    adapters: Callable[[TrainConfig], LoraConfig | None]
    """The adapters that it trains; None: all parameters."""
    build: Callable[[TrainConfig, Any], Stage]
    """(config, architecture) -> the stage."""
    load: Callable[[TrainConfig, Inputs], Examples]
    """Reads and tokenises what it trains on and is evaluated on."""
    feed: Callable[[RunContext, Stage, Params, dict[str, Params]], Feed]
    """(run, stage, parameters at the beginning, what the step reads) -> its data."""
    finish: Callable[[RunContext, Params, Params], Outcome]
    """(run, parameters at the beginning, those that it kept) -> what it leaves."""
    check: Callable[[TrainConfig], None] = lambda config: None
    """Raises `UserError` where the config lacks what it needs, before anything is loaded."""

    def settings(self, config: TrainConfig) -> StageConfig:
        """Its steps, batch size and optimiser."""
        return getattr(config, self.name)
