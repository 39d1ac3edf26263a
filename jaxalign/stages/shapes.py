"""A stage's state and what its step reads, as shapes: mesh, batch and remat change none of them."""

from dataclasses import dataclass
from typing import Any

import jax

from jaxalign.sharding.structs import Structs
from jaxalign.stages.models import parameter_structs
from jaxalign.training.stage import Stage
from jaxalign.training.step import TrainState, initial_state


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a stage's step reads and writes, wherever it lies."""

    params: Structs
    """Those that the stage begins with."""
    state: TrainState
    frozen: dict[str, Structs]


def shapes_of(stage: Stage, model_config: Any) -> Shapes:
    """Shapes of a stage of this architecture.

    Args:
      stage: as the run builds it.
      model_config: the architecture.
    """

    def begin(params: Any) -> Any:
        return stage.begin(params, lambda new: new)

    def state(params: Any) -> TrainState:
        return initial_state(stage.trained(params), stage.optimizer, seed=0, running=stage.running)

    params = jax.eval_shape(begin, parameter_structs(model_config))
    frozen = stage.frozen(params, _copy, lambda field, folder: _copy(params))
    return Shapes(params=params, state=jax.eval_shape(state, params), frozen=frozen)


def _copy(tree: Structs) -> Structs:
    """Shapes of a copy."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
