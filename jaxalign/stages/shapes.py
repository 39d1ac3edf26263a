"""Shapes of a stage's state and frozen parameters; they do not depend on mesh, batch or remat."""

from dataclasses import dataclass
from typing import Any

import jax

from jaxalign.models.config import ModelConfig
from jaxalign.sharding.structs import Structs
from jaxalign.stages.models import parameter_structs
from jaxalign.training.stage import Stage
from jaxalign.training.step import TrainState, initial_state


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Shapes of what a stage's step reads and writes."""

    params: Structs
    """Initial parameters."""
    resident: Structs
    """Those of them that are on the devices before the stage begins."""
    state: TrainState
    frozen: dict[str, Structs]


def shapes_of(stage: Stage, model_config: ModelConfig) -> Shapes:
    """Shapes of a stage.

    Args:
      stage: of the run.
      model_config: the architecture.
    """

    def begin(params: Any) -> Any:
        return stage.begin(params, lambda new: new)

    def state(params: Any) -> TrainState:
        return initial_state(
            stage.trained(params),
            stage.optimizer,
            seed=0,
            running=stage.running,
            moving=stage.moving,
        )

    params = jax.eval_shape(begin, parameter_structs(model_config))
    stored = stage.stored(params, _copy)
    frozen = stage.frozen(stored, _copy, lambda field, folder: _copy(params))
    return Shapes(
        params=params,
        resident=params if stored is params else None,
        state=jax.eval_shape(state, params),
        frozen=frozen,
    )


def _copy(tree: Structs) -> Structs:
    """Shapes of a copy."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
