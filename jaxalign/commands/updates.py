"""What a stage's step is made of, from its config: the same objects for a run and for its plan."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.commands.scores import trains_scores
from jaxalign.commands.stages import STAGES, stage_adapters
from jaxalign.config import StageConfig, TrainConfig
from jaxalign.entanglement.cures import CURES
from jaxalign.entanglement.masks import initial_head
from jaxalign.errors import UserError
from jaxalign.losses import hidden_state_distance, hidden_state_matching
from jaxalign.losses.lookup import find_loss
from jaxalign.models import tempered
from jaxalign.models.lora import init_adapters
from jaxalign.models.score import SCORE, init_head
from jaxalign.online import Algorithm, OnlineObjective
from jaxalign.online.lookup import find_algorithm
from jaxalign.online.step import remembering, update_step
from jaxalign.representation import Reader, RepresentationObjective, default_layers
from jaxalign.training.masking import HEAD, MaskedPreferenceObjective
from jaxalign.training.objectives import (
    Policy,
    PreferenceObjective,
    SupervisedObjective,
    TokenPreferenceObjective,
)
from jaxalign.training.optimizers import (
    make_optimizer,
    make_schedule,
    preconditioner,
    with_rule,
)
from jaxalign.training.reward_objectives import VALUES, ScoreObjective
from jaxalign.training.step import train_step
from jaxalign.training.watching import Watch

DISTANCES = {"squared": hidden_state_matching, "norm": hidden_state_distance}
"""`alignment.distance` -> its loss."""


def has_reference(objective: Any) -> bool:
    """Whether an objective's loss or metrics read a reference."""
    return not isinstance(objective, PreferenceObjective) or objective.has_reference


def keeps_reference_live(config: TrainConfig, objective: Any, pairs: int) -> bool:
    """Whether each step computes the reference's log-probs, where it has a reference.

    Else they are computed once, before the first step.

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


def make_policy(config: TrainConfig, name: str, model_config: Any) -> Policy:
    """How a stage's parameters make up the policy.

    Args:
      config: of the run.
      name: the stage's.
      model_config: the architecture; the online stage has it at its temperature.
    """
    lora = stage_adapters(config, name)
    if name == "online":
        model_config = tempered(model_config, config.rollout.temperature)
    return Policy(
        config=model_config,
        adapter_scale=None if lora is None else lora.scale,
        adapter_dropout=0.0 if lora is None else lora.dropout,
        remat="none" if config.remat == "auto" else config.remat,  # decided before any step
        dtype=jnp.dtype(config.dtype),
    )


def make_objective(config: TrainConfig, name: str, policy: Policy) -> Any:
    """What a stage minimises.

    Raises:
      UserError: the loss needs the reference itself and its log-probs alone are kept; the model has
        no layer that is to be aligned.
    """
    if name == "online":
        return OnlineObjective(policy=policy, algorithm=algorithm_of(config))
    if name == "representation":
        wanted = config.alignment
        reader = make_reader(config, policy.config, remat=policy.remat, dtype=policy.dtype)
        loss: Any = DISTANCES[wanted.distance]
        return RepresentationObjective(policy=policy, reader=reader, alpha=wanted.alpha, loss=loss)
    if name != "preference":
        return SupervisedObjective(policy=policy)
    options = dict(config.loss_options)
    if trains_scores(config, name):
        return ScoreObjective(policy=policy, values=VALUES[config.loss], options=options)
    loss = find_loss(config.loss, config.loss_options)
    if loss.reads == "tokens":
        if config.reference in ("precomputed", "none"):
            raise UserError(
                f"reference: {config.loss} reads the reference's whole distribution at every "
                "token; set --reference live"
            )
        return TokenPreferenceObjective(policy=policy, loss=loss.function, options=options)
    mask = config.entanglement.mask
    if mask == "none":
        needed = loss.needs_reference
        if needed and config.reference == "none":
            raise UserError(
                f"reference: {config.loss} reads the reference's log-probs; set --reference auto"
            )
        return PreferenceObjective(
            policy=policy,
            loss=loss.function,
            options=options,
            coupled=loss.coupled,
            has_reference=needed or config.reference in ("live", "precomputed"),
        )
    return MaskedPreferenceObjective(
        policy=policy,
        loss=loss.function,
        options=options,
        coupled=loss.coupled,
        penalty=config.entanglement.mask_penalty if mask == "learned" else 0.0,
    )


def algorithm_of(config: TrainConfig) -> Algorithm:
    """The algorithm of the online stage."""
    return find_algorithm(config.rollout.algorithm, config.rollout.options)


def make_reader(config: TrainConfig, model_config: Any, **how: Any) -> Reader:
    """The hidden states that a config names.

    Raises:
      UserError: the model has no such layer.
    """
    depth = getattr(model_config, "layers", 0)
    layers = config.alignment.layers or default_layers(depth, config.alignment.method)
    layers = tuple(sorted(set(layers)))
    reader = Reader(config=model_config, layers=layers, **how)
    if not 1 <= layers[0] <= layers[-1] <= depth:
        raise UserError(f"alignment.layers: {list(layers)}; the model's are 1 to {depth}")
    return reader


def make_watch(config: TrainConfig, name: str, objective: Any) -> Watch | None:
    """What a stage sees of its pairs; None: nothing."""
    wanted, rule = config.entanglement, config.preference.optimizer
    if name != "preference" or trains_scores(config, name) or not wanted.every:
        return None
    weigh = functools.partial(preconditioner, b2=rule.b2, eps=rule.eps)
    return Watch(
        objective=objective,
        parts=wanted.parts,
        cure=CURES.get(wanted.cure),
        realised=wanted.realised,
        preconditioner=weigh if wanted.preconditioned else None,
    )


def stage_step(
    config: TrainConfig,
    name: str,
    objective: Any,
    optimizer: optax.GradientTransformation,
    watch: Watch | None = None,
) -> Callable[[Any, Any, Any], Any]:
    """(state, frozen, batch) -> (state, metrics): what `compile_step` compiles for a stage."""
    parts = getattr(config, name).micro_batches
    how = {"objective": objective, "optimizer": optimizer, "micro_batches": parts}
    if name == "online":
        return functools.partial(update_step, **how)
    return functools.partial(train_step, **how, watch=watch)


def make_update_rule(
    config: TrainConfig, name: str
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """A stage's optimiser and its learning-rate schedule.

    The online stage's schedule counts rollouts, its optimiser updates.
    """
    stage, algorithm = getattr(config, name), algorithm_of(config) if name == "online" else None
    times = 1 if algorithm is None else algorithm.updates * algorithm.minibatches
    optimizer, schedule = _update_rule(stage, times)
    if algorithm is not None:
        optimizer = remembering(algorithm, optimizer)
    if _learns_mask(config, name):
        optimizer = with_rule(HEAD, config.entanglement.mask_learning_rate, optimizer)
    return optimizer, schedule if times == 1 else lambda step: schedule(step * times)


def _update_rule(
    stage: StageConfig, times: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The rule of a stage whose every step is so many updates."""
    config = stage.optimizer
    share = math.ceil(config.warmup_fraction * stage.steps - 1e-9)  # 0.1 * 30 is above 3
    schedule = make_schedule(
        learning_rate=config.learning_rate,
        steps=stage.steps * times,
        schedule=config.schedule,
        warmup_steps=max(config.warmup_steps, share) * times,
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


# ------------------------------------------------------------------------------ parameters


def trained_parameters(config: TrainConfig, name: str, model_config: Any, params: Any) -> Any:
    """What a stage trains, given the parameters that it begins with (with their head, if any)."""
    key = jax.random.key(config.seed + 1 + STAGES.index(name))
    lora, trained = stage_adapters(config, name), params
    if lora is not None:
        trained = init_adapters(params, key, rank=lora.rank, targets=lora.targets)
    if trains_scores(config, name):  # a head is trained whole, also with adapters
        trained = {**trained, SCORE: params[SCORE]}
    if _learns_mask(config, name):
        head = initial_head(model_config.width, model_config.vocab_size)
        trained = {**trained, HEAD: head}
    if _has_critic(config, name):
        trained = {**trained, SCORE: init_head(model_config.width, key)}
    return trained


def frozen_parameters(
    config: TrainConfig, name: str, objective: Any, params: Any, copy: Callable[[Any], Any]
) -> dict[str, Any]:
    """What a stage's step reads and never changes: {"policy", "reference"}, None where not needed.

    Args:
      config: of the run.
      name: the stage's.
      objective: what it minimises.
      params: that the stage begins with.
      copy: makes the reference where the policy's own buffers are donated to the first step.
    """
    adapted = stage_adapters(config, name) is not None
    frozen = {"policy": params if adapted else None, "reference": None}
    if not has_reference(objective):
        return frozen
    if name in ("preference", "online", "representation") and not trains_scores(config, name):
        frozen["reference"] = params if adapted else copy(params)
    return frozen


def kept_parameters(config: TrainConfig, name: str, trained: Any) -> Any:
    """Of what a stage has trained, what the next one goes on with: no mask and no critic."""
    left = {HEAD} if _learns_mask(config, name) else set()
    left |= {SCORE} if _has_critic(config, name) else set()
    return {key: tree for key, tree in trained.items() if key not in left} if left else trained


def _learns_mask(config: TrainConfig, name: str) -> bool:
    return name == "preference" and config.entanglement.mask == "learned"


def _has_critic(config: TrainConfig, name: str) -> bool:
    return name == "online" and algorithm_of(config).advantages is not None
