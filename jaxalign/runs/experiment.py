"""An experiment's config, fitted to the fields that a user sets."""

import dataclasses
import inspect
from collections.abc import Mapping

from jaxalign.config import EntanglementConfig, StageConfig, TrainConfig
from jaxalign.errors import UserError
from jaxalign.losses import REWARD_LOSSES, TOKEN_LOSSES
from jaxalign.modules import find_module, users_code

SCALES = ("tiny", "paper")
"""Of an experiment that has no SCALES of its own."""


def load_config(name: str, scale: str, *, adapters: bool = False) -> TrainConfig:
    """The config that an experiment's `config` returns.

    Args:
      name: a Python file or module with a function `config`, or "FILE.py:FUNCTION".
      scale: one of its scales; told to a `config` that has a parameter `scale`.
      adapters: whether adapters will be trained, whose rates are others; told to a `config` that
        has a parameter `adapters`.

    Raises:
      UserError: there is no such experiment or scale, or it returns something else.
    """
    file, colon, function_name = name.rpartition(":")
    if not colon or not function_name.isidentifier():
        file, function_name = name, "config"
    module = find_module(file, "experiment")
    scales = getattr(module, "SCALES", SCALES)
    if scale not in scales:
        raise UserError(f"--scale: {scale!r} is not one of {', '.join(scales)}")
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{file}: has no function {function_name}() that returns a TrainConfig")
    with users_code(f"{file}: {function_name}()"):
        told = {"scale": scale, "adapters": adapters}
        taken = inspect.signature(function).parameters
        config = function(**{key: value for key, value in told.items() if key in taken})
    if not isinstance(config, TrainConfig):
        raise UserError(
            f"{file}: {function_name}() returned {type(config).__name__}, not a TrainConfig"
        )
    return config


def fitted(config: TrainConfig, typed: Mapping[str, str]) -> tuple[TrainConfig, list[str]]:
    """An experiment's config without what does not go with fields set on the command line.

    What was typed itself stays, and is refused where it does not go.

    Args:
      config: the experiment's.
      typed: field -> value, of the command line.

    Returns:
      The config, and a line for each change.
    """
    config, notes = _with_own_data(_with_own_length(config, typed), typed)
    loss = typed.get("loss", config.loss)
    watched = config.entanglement != EntanglementConfig()
    mine = any(name.startswith("entanglement.") for name in typed)
    if watched and not mine and loss in TOKEN_LOSSES | REWARD_LOSSES:
        config = dataclasses.replace(config, entanglement=EntanglementConfig())
        notes.append(f"entanglement: switched off; {loss} has no log-probs of pairs to watch")
    rule = typed.get("preference.optimizer.name", config.preference.optimizer.name)
    if config.entanglement.preconditioned and not mine and rule != "adamw":
        watch = dataclasses.replace(config.entanglement, preconditioned=False)
        config = dataclasses.replace(config, entanglement=watch)
        notes.append(f"entanglement.preconditioned: switched off; {rule} is not adamw")
    for name in ("online", "representation"):
        stage: StageConfig = getattr(config, name)
        if stage.runs and f"{name}.steps" not in typed and loss in REWARD_LOSSES:
            config = dataclasses.replace(config, **{name: StageConfig()})
            notes.append(f"{name}: left out; {loss} makes no policy")
    for name, stage in vars(config).items():
        steps = typed.get(f"{name}.steps", "")
        if not isinstance(stage, StageConfig) or not steps.isdecimal() or not int(steps):
            continue
        warmup = f"{name}.optimizer.warmup_steps"
        if stage.optimizer.warmup_steps > int(steps) and warmup not in typed:
            rule = dataclasses.replace(stage.optimizer, warmup_steps=int(steps))
            shorter = dataclasses.replace(stage, optimizer=rule, steps=int(steps))
            config = dataclasses.replace(config, **{name: shorter})
            notes.append(f"{warmup}: {steps}, as the stage has no more steps")
    return config, notes


def _with_own_length(config: TrainConfig, typed: Mapping[str, str]) -> TrainConfig:
    """Of two fields that say the same in different units the typed one alone: steps or epochs."""
    for name, stage in vars(config).items():
        if not isinstance(stage, StageConfig):
            continue
        rule, changes = stage.optimizer, {}
        if f"{name}.epochs" in typed and stage.steps:
            # a warm-up as long as before, of steps that are not known yet
            share = rule.warmup_fraction or rule.warmup_steps / stage.steps
            rule = dataclasses.replace(rule, warmup_steps=0, warmup_fraction=share)
            changes["steps"] = 0
        elif f"{name}.steps" in typed:
            changes["epochs"] = 0.0
        if f"{name}.optimizer.warmup_steps" in typed:
            rule = dataclasses.replace(rule, warmup_fraction=0.0)
        elif f"{name}.optimizer.warmup_fraction" in typed:
            rule = dataclasses.replace(rule, warmup_steps=0)
        changed = dataclasses.replace(stage, optimizer=rule, **changes)
        config = dataclasses.replace(config, **{name: changed})
    return config


def _with_own_data(config: TrainConfig, typed: Mapping[str, str]) -> tuple[TrainConfig, list[str]]:
    """Where data was typed, without the experiment's files that were to go with its own."""
    notes: list[str] = []
    held_out = f"{config.holdout:.0%} of --{{}} is held out; --{{}} names another set"
    rollout = config.rollout
    prompts = "rollout.prompts" in typed
    if "data" in typed:
        for field, instead in (
            ("eval_data", held_out.format("data", "eval-data")),
            ("sft_data", "SFT imitates the responses in --data; --sft-data names others"),
        ):
            if getattr(config, field) is not None and field not in typed:
                notes.append(f"{field}: {getattr(config, field)} is left out; {instead}")
                config = dataclasses.replace(config, **{field: None})
        if config.online.runs and not prompts and rollout.prompts != "embedded":
            notes.append(f"rollout.prompts: those of --data instead of {rollout.prompts}")
            rollout, prompts = dataclasses.replace(rollout, prompts=typed["data"]), True
    if prompts and rollout.eval_prompts is not None and "rollout.eval_prompts" not in typed:
        instead = held_out.format("rollout.prompts", "rollout.eval-prompts")
        notes.append(f"rollout.eval_prompts: {rollout.eval_prompts} is left out; {instead}")
        rollout = dataclasses.replace(rollout, eval_prompts=None)
    if "text" in typed and config.eval_text and "eval_text" not in typed:
        notes.append("eval_text: the experiment's is left out; --eval-text names held-out text")
        config = dataclasses.replace(config, eval_text=())
    return dataclasses.replace(config, rollout=rollout), notes
