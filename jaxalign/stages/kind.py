"""A kind of stage: builds a `Stage` from a config, and its `Feed` from the data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jax.sharding import Mesh

from jaxalign.config import LoraConfig, StageConfig, TrainConfig
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.models.config import ModelConfig
from jaxalign.stages.inputs import Inputs
from jaxalign.training.metrics import Writer
from jaxalign.training.stage import Feed, Params, Stage


@runtime_checkable
class Examples(Protocol):
    """Training data of a stage."""

    def examples(self, seed: int) -> int:
        """Number of rows in an epoch."""
        ...


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """Everything that the stages of a run have in common."""

    config: TrainConfig
    folder: Path
    mesh: Mesh
    model_config: ModelConfig
    tokenizer: Tokenizer
    data: Mapping[str, Any]
    """Data of each stage, by its name."""
    writers: Sequence[Writer]


Outcome = tuple[Params, Params | None]
"""Final parameters and None; or frozen parameters and trained adapters."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of stage. To add one, write a module with such a value and add it to `KINDS`."""

    name: str
    """The field of `TrainConfig` with its steps, batch size and optimiser."""
    adapters: Callable[[TrainConfig], LoraConfig | None]
    """Config -> adapters to train; None: all parameters."""
    build: Callable[[TrainConfig, Any], Stage]
    """(config, architecture) -> the stage."""
    load: Callable[[TrainConfig, Inputs], Examples]
    """Reads and tokenises training and held-out data."""
    feed: Callable[[RunContext, Stage, Params, dict[str, Params]], Feed]
    """(run, stage, initial parameters, frozen parameters by role) -> feed."""
    finish: Callable[[RunContext, Params, Params], Outcome]
    """(run, initial parameters, trained parameters to keep) -> outcome."""
    settle: Callable[[TrainConfig, Any], TrainConfig] = lambda config, data: config
    """(config, the stage's data) -> the config with what the data decide."""
    check: Callable[[TrainConfig], None] = lambda config: None
    """Raises `UserError` if the config lacks what the stage needs, before anything is loaded."""

    def settings(self, config: TrainConfig) -> StageConfig:
        """Its steps, batch size and optimiser."""
        return getattr(config, self.name)
