"""What a stage's step is made of, from its config: policy, objective, update rule."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.commands.find import find_loss
from jaxalign.commands.scores import trains_scores
from jaxalign.config import StageConfig, TrainConfig
from jaxalign.entanglement.cures import CURES
from jaxalign.errors import UserError
from jaxalign.training.masking import MaskedPreferenceObjective
from jaxalign.training.objectives import (
    Policy,
    PreferenceObjective,
    SupervisedObjective,
    TokenPreferenceObjective,
)
from jaxalign.training.optimizers import make_optimizer, make_schedule, preconditioner
from jaxalign.training.reward_objectives import VALUES, ScoreObjective
from jaxalign.training.watching import Watch


def remat_on(config: TrainConfig, platform: str) -> str:
    """What is computed anew on a platform."""
    if config.remat == "auto":
        return "full" if platform == "cpu" else "none"
    return config.remat


def keeps_reference_live(config: TrainConfig, objective: Any, pairs: int) -> bool:
    """Whether each step computes the reference's log-probs; else they are computed before all.

    Args:
      config: of the run.
      objective: of the preference stage; what reads more than log-probs needs the reference live.
      pairs: to train on; once through the reference is less work where they come more than once.
    """
    if config.reference != "auto":
        return config.reference == "live"
    masked = isinstance(objective, MaskedPreferenceObjective)
    reads_more = masked or not isinstance(objective, PreferenceObjective)
    return reads_more or config.preference.steps * config.preference.batch_size <= pairs


def make_policy(
    config: TrainConfig, name: str, model_config: Any, *, platform: str | None = None
) -> Policy:
    """How a stage's parameters make up the policy; pretraining trains all of them."""
    lora = config.lora if config.lora.rank and name != "pretrain" else None
    return Policy(
        config=model_config,
        adapter_scale=None if lora is None else lora.scale,
        adapter_dropout=0.0 if lora is None else lora.dropout,
        remat=remat_on(config, platform or jax.default_backend()),
        dtype=jnp.dtype(config.dtype),
    )


def make_objective(config: TrainConfig, name: str, policy: Policy) -> Any:
    """What a stage minimises.

    Raises:
      UserError: the loss needs the reference itself and its log-probs alone are kept.
    """
    if name != "preference":
        return SupervisedObjective(policy=policy)
    options = dict(config.loss_options)
    if trains_scores(config, name):
        return ScoreObjective(policy=policy, values=VALUES[config.loss], options=options)
    loss, reads_tokens, coupled = find_loss(config.loss, config.loss_options)
    if reads_tokens:
        if config.reference == "precomputed":
            raise UserError(
                f"reference: {config.loss} reads the reference's whole distribution at every "
                "token; set --reference live"
            )
        return TokenPreferenceObjective(policy=policy, loss=loss, options=options)
    mask = config.entanglement.mask
    if mask == "none":
        return PreferenceObjective(policy=policy, loss=loss, options=options, coupled=coupled)
    return MaskedPreferenceObjective(
        policy=policy,
        loss=loss,
        options=options,
        coupled=coupled,
        penalty=config.entanglement.mask_penalty if mask == "learned" else 0.0,
    )


def make_watch(config: TrainConfig, objective: Any) -> Watch:
    """What the preference stage sees of its pairs."""
    wanted, rule = config.entanglement, config.preference.optimizer
    weigh = functools.partial(preconditioner, b2=rule.b2, eps=rule.eps)
    return Watch(
        objective=objective,
        parts=wanted.parts,
        cure=CURES.get(wanted.cure),
        realised=wanted.realised,
        preconditioner=weigh if wanted.preconditioned else None,
    )


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
        parameter_scale=config.parameter_scale,
    )
    return optimizer, schedule
