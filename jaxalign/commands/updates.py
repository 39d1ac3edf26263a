"""The update rule of a stage, from its config."""

import optax

from jaxalign.config import StageConfig
from jaxalign.training.optimizers import make_optimizer, make_schedule


def make_update_rule(
    stage: StageConfig,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser and its learning-rate schedule."""
    config = stage.optimizer
    schedule = make_schedule(
        learning_rate=config.learning_rate,
        steps=stage.steps,
        schedule=config.schedule,
        warmup_steps=config.warmup_steps,
        final_fraction=config.final_fraction,
    )
    optimizer = make_optimizer(
        config.name,
        schedule,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        momentum=config.momentum,
    )
    return optimizer, schedule
