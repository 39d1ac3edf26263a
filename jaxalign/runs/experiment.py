"""An experiment's config, adjusted to the fields that a user sets."""

import dataclasses
import inspect
from collections.abc import Mapping

from jaxalign.config import EntanglementConfig, TrainConfig, with_fields
from jaxalign.data.mixtures import weighted_sources
from jaxalign.errors import UserError
from jaxalign.losses import REWARD_LOSSES, TOKEN_LOSSES
from jaxalign.modules import find_module, users_code

SCALES = ("tiny", "paper")
"""Scales of an experiment that does not define SCALES."""


def load_config(name: str, scale: str, *, adapters: bool = False) -> TrainConfig:
    """The config that an experiment's `config` returns.

    Args:
      name: a Python file or module with a function `config`, or "FILE.py:FUNCTION".
      scale: one of its scales; passed to a `config` with a parameter `scale`.
      adapters: whether adapters will be trained, which need other learning rates; passed to a
        `config` with a parameter `adapters`.

    Raises:
      UserError: there is no such experiment or scale, or it does not return a config.
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
        arguments = {"scale": scale, "adapters": adapters}
        parameters = inspect.signature(function).parameters
        config = function(**{key: arguments[key] for key in arguments if key in parameters})
    if not isinstance(config, TrainConfig):
        raise UserError(
            f"{file}: {function_name}() returned {type(config).__name__}, not a TrainConfig"
        )
    return config


def fitted(config: TrainConfig, typed: Mapping[str, str]) -> tuple[TrainConfig, list[str]]:
    """An experiment's config, without fields that conflict with those set on the command line.

    Fields set on the command line are never changed; conflicts between them raise an error later.

    Args:
      config: the experiment's.
      typed: field -> value on the command line.

    Returns:
      The config, and a line for each change.
    """
    config, notes = _with_own_data(_with_own_length(config, typed), typed)
    loss = typed.get("loss", config.preference.loss)
    settings = config.preference.entanglement
    is_typed = any(name.startswith("entanglement.") for name in typed)
    has_statistics = settings != EntanglementConfig()
    if has_statistics and not is_typed and loss in TOKEN_LOSSES | REWARD_LOSSES:
        config = with_fields(config, entanglement=EntanglementConfig())
        notes.append(f"entanglement: switched off; {loss} has no log-probs of pairs")
    rule = typed.get("preference.optimizer.name", config.preference.optimizer.name)
    if settings.preconditioned and not is_typed and rule != "adamw":
        config = with_fields(config, **{"entanglement.preconditioned": False})
        notes.append(
            f"entanglement.preconditioned: switched off; it needs the optimiser adamw, not {rule}"
        )
    for name in ("feedback", "online", "representation"):
        runs = getattr(config, name).runs
        if runs and f"{name}.steps" not in typed and loss in REWARD_LOSSES:
            config = with_fields(config, **{f"{name}.steps": 0, f"{name}.epochs": 0.0})
            notes.append(f"{name}: skipped; {loss} trains no policy")
    for name, stage in config.stages().items():
        steps = typed.get(f"{name}.steps", "")
        if not steps.isdecimal() or not int(steps):
            continue
        warmup = f"{name}.optimizer.warmup_steps"
        if stage.optimizer.warmup_steps > int(steps) and warmup not in typed:
            config = with_fields(config, **{f"{name}.steps": int(steps), warmup: int(steps)})
            notes.append(f"{warmup}: {steps}, the number of steps of the stage")
    return config, notes


def _with_own_length(config: TrainConfig, typed: Mapping[str, str]) -> TrainConfig:
    """Of steps and epochs, and of the two warm-up fields, keep the one set on the command line."""
    for name, stage in config.stages().items():
        rule, changes = stage.optimizer, {}
        if f"{name}.epochs" in typed and stage.steps:
            # the same warm-up as a fraction, since the number of steps is not known yet
            fraction = rule.warmup_fraction or rule.warmup_steps / stage.steps
            rule = dataclasses.replace(rule, warmup_steps=0, warmup_fraction=fraction)
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
    """Drop the experiment's files that belong to data replaced on the command line."""
    notes: list[str] = []
    held_out = f"{config.holdout:.0%} of --{{}} is held out; set --{{}} for another set"
    own = {"eval_data": config.eval_data, "sft_data": config.sft.data}
    rollout = config.online.rollout
    prompts = "rollout.prompts" in typed
    if "data" in typed:
        for field, instead in (
            ("eval_data", held_out.format("data", "eval-data")),
            ("sft_data", "SFT trains on the responses in --data; set --sft-data for others"),
        ):
            if own[field] and field not in typed:
                notes.append(f"{field}: {', '.join(own[field] or ())} is dropped; {instead}")
                config = with_fields(config, **{field: ()})
        if config.online.runs and not prompts and rollout.prompts != "embedded":
            notes.append(f"rollout.prompts: those of --data instead of {rollout.prompts}")
            source = weighted_sources(typed["data"])[0].source
            rollout, prompts = dataclasses.replace(rollout, prompts=source), True
    if prompts and rollout.eval_prompts is not None and "rollout.eval_prompts" not in typed:
        instead = held_out.format("rollout.prompts", "rollout.eval-prompts")
        notes.append(f"rollout.eval_prompts: {rollout.eval_prompts} is dropped; {instead}")
        rollout = dataclasses.replace(rollout, eval_prompts=None)
    if "text" in typed and config.pretrain.eval_text and "eval_text" not in typed:
        notes.append("eval_text: the experiment's is dropped; set --eval-text for held-out text")
        config = with_fields(config, eval_text=())
    return with_fields(config, rollout=rollout), notes
