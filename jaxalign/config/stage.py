"""What every stage has: steps, batch size and optimiser."""

import dataclasses
from typing import Literal

from jaxalign.config.fields import AtLeastOne, BelowOne, Count, NonNegative, Positive, Share
from jaxalign.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimiser of optax and its schedule."""

    name: Literal["adamw", "adafactor", "lion", "rmsprop", "sgd"] = "adamw"
    """Update rule."""
    learning_rate: NonNegative = 5e-7
    """Peak learning rate; 5e-7 is the DPO repository's."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What follows the warm-up."""
    warmup_steps: Count = 0
    """Updates over which the learning rate rises linearly from 0."""
    warmup_fraction: Share = 0.0
    """Warm-up as a fraction of the stage's updates, rounded up; instead of warmup_steps."""
    final_fraction: Share = 0.0
    """Last learning rate as a fraction of the peak."""
    weight_decay: NonNegative = 0.0
    """Decoupled decay of matrices; norms and biases are never decayed."""
    clip_norm: Positive | None = 1.0
    """Largest global norm of the gradient; None does not clip."""
    b1: BelowOne = 0.9
    """Decay of the first moment."""
    b2: BelowOne = 0.999
    """Decay of the second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    momentum: BelowOne | None = None
    """Momentum of sgd and rmsprop."""
    parameter_scale: bool = False
    """Whether Adafactor's learning rate is relative to each parameter's root mean square, as in
    T5X."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every stage of a run has; each kind of stage adds its own fields."""

    steps: Count = 0
    """Number of updates; 0 skips the stage."""
    epochs: NonNegative = 0.0
    """Passes over the stage's training data, instead of steps: rows * epochs / batch_size updates,
    rounded up."""
    batch_size: AtLeastOne = 32
    """Pairs (responses in SFT, rows of text in pretraining) per update, over all devices and
    micro-batches."""
    micro_batches: AtLeastOne = 1
    """Number of parts into which a batch is split to save memory; the gradient is that of the whole
    batch."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Update rule and learning rate."""
    eval_every: Count = 0
    """Steps between evaluations on held-out data; 0: only at the start and at the end."""
    save_every: Count = 0
    """Steps between checkpoints; 0: only at the end."""

    @property
    def runs(self) -> bool:
        """Whether the run has this stage."""
        return self.steps > 0 or self.epochs > 0


def check_stage(name: str, stage: StageConfig) -> None:
    """Check the fields that constrain each other.

    Args:
      name: of the stage, for messages.
      stage: every field has its type and range.

    Raises:
      UserError: names the field.
    """
    if stage.batch_size % stage.micro_batches:
        raise UserError(
            f"{name}.batch_size: {stage.batch_size} is not a multiple of "
            f"{name}.micro_batches: {stage.micro_batches}"
        )
    rule = stage.optimizer
    for one, other, values in (
        ("epochs", "steps", stage),
        ("optimizer.warmup_fraction", "optimizer.warmup_steps", rule),
    ):
        set_values = [getattr(values, field.rpartition(".")[2]) for field in (one, other)]
        if all(set_values):
            raise UserError(
                f"{name}.{one}: {set_values[0]:g}, and {name}.{other} is {set_values[1]}; "
                "set one of them to 0"
            )
    if stage.steps and rule.warmup_steps > stage.steps:
        raise UserError(
            f"{name}.optimizer.warmup_steps: {rule.warmup_steps} is more than "
            f"{name}.steps: {stage.steps}"
        )
