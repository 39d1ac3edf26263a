"""The kinds of stages, one module each: a config becomes a list of `Stage` values."""

from jaxalign.config import TrainConfig
from jaxalign.errors import UserError
from jaxalign.losses import REWARD_LOSSES
from jaxalign.stages import (
    feedback,
    online,
    preference,
    pretraining,
    representation,
    scores,
    supervised,
)
from jaxalign.stages.kind import Kind, RunContext

__all__ = ["KINDS", "NAMES", "Kind", "RunContext", "kind_of", "kinds_of"]

KINDS = (
    pretraining.KIND,
    supervised.KIND,
    preference.KIND,
    feedback.KIND,
    online.KIND,
    representation.KIND,
)
"""All kinds, in the order of a run."""
NAMES = tuple(kind.name for kind in KINDS)
"""Names of the kinds, which are fields of the config."""


def kind_of(config: TrainConfig, name: str) -> Kind:
    """The kind of a stage, by its name.

    Raises:
      UserError: there is no such stage.
    """
    if name == preference.KIND.name and config.preference.loss in REWARD_LOSSES:
        return scores.KIND
    for kind in KINDS:
        if kind.name == name:
            return kind
    raise UserError(f"stage: {name!r} is not one of {', '.join(NAMES)}")


def kinds_of(config: TrainConfig) -> list[Kind]:
    """The kinds of the stages that a config runs, in order."""
    kinds = [kind_of(config, name) for name in NAMES]
    return [kind for kind in kinds if kind.settings(config).runs]
