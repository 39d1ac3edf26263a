"""From an experiment's name and flags to its config."""

import contextlib
import dataclasses
import inspect
import io
import itertools
import sys
import typing
from collections.abc import Mapping, Sequence

from jaxalign.commands.arguments import check_names
from jaxalign.commands.rates import high_rates, is_large
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


def parse(arguments: Sequence[str]) -> TrainConfig:
    """`EXPERIMENT [--scale tiny|paper] [--field value ...]` -> the config of this run.

    Raises:
      UserError: the experiment cannot be found or returns no config; a flag is unknown or has a
        wrong value.
      SystemExit: --help.
    """
    import tyro

    rest = [
        part
        for text in arguments
        for part in (text.split("=", 1) if text.startswith("--scale=") else [text])
    ]
    typed: dict[str, str] = {}
    if not rest or rest[0].startswith("-"):
        if rest and rest[0] not in ("-h", "--help"):
            raise UserError(f"EXPERIMENT comes first, before {rest[0]}; see jaxalign train --help")
        config = TrainConfig()
        rest = ["--help"]
    else:
        experiment = rest.pop(0)
        scale = "tiny"
        if "--scale" in rest:
            at = rest.index("--scale")
            scale = rest[at + 1] if at + 1 < len(rest) else ""
            del rest[at : at + 2]
        typed = _typed(rest)
        adapters = typed.get("lora.rank", "0").lstrip("0") != ""
        config = load_config(experiment, scale, adapters=adapters)
        check_names(rest, _names(TrainConfig), "jaxalign train --help")
        config, notes = fitted(config, typed)
        for note in notes:
            print(f"{experiment}: {note}", file=sys.stderr)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            given = tyro.cli(
                TrainConfig,
                default=_with_options(config, {}, {}),
                args=rest,
                prog="jaxalign train EXPERIMENT [--scale tiny|paper]",
                description="Run an experiment; every field of its config can be set here.",
                config=(tyro.conf.OmitSubcommandPrefixes,),
            )
    except SystemExit as left:
        if left.code == 0:
            raise
        raise UserError(_in_one_line(left, complaint.getvalue())) from None
    if config.model == "embedded" != given.model:
        for name, high in high_rates(given).items():
            if f"{name}.optimizer.learning_rate" not in typed and is_large(given.model):
                raise UserError(
                    f"{name}.optimizer: {high} is this experiment's for a small model from random "
                    f"weights, and would wreck {given.model}; run experiments/finetune.py instead, "
                    f"or set --{name}.optimizer.learning-rate"
                )
    # the experiment's options belong to its own loss or algorithm, and to no other one
    own = not given.loss_options and given.loss == config.loss
    loss = config.loss_options if own else given.loss_options
    own = not given.rollout.options and given.rollout.algorithm == config.rollout.algorithm
    return _with_options(given, loss, config.rollout.options if own else given.rollout.options)


def _typed(arguments: Sequence[str]) -> dict[str, str]:
    """Field -> the first value of it on the command line; "" where none follows."""
    typed = {}
    for text, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if text.startswith("--"):
            name, equals, value = text[2:].partition("=")
            typed[name.replace("-", "_")] = value if equals else following
    return typed


def _names(cls: type, prefix: str = "") -> list[str]:
    """The flags of a config's fields."""
    names = ["--help"] if not prefix else []
    for name, hint in typing.get_type_hints(cls).items():
        flag = name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            names += _names(typing.cast(type, hint), f"{prefix}{flag}.")
        else:
            names += [f"--{prefix}{flag}", *([f"--{prefix}no-{flag}"] if hint is bool else [])]
    return names


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


def _with_options(config: TrainConfig, loss: dict, algorithm: dict) -> TrainConfig:
    rollout = dataclasses.replace(config.rollout, options=algorithm)
    return dataclasses.replace(config, loss_options=loss, rollout=rollout)


def _in_one_line(left: SystemExit, text: str) -> str:
    """What a config or the flags' parser objects to, without the parser's frame."""
    cause: BaseException | None = left
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__context__
    lines = [line.strip(" │|─-╭╮╰╯") for line in text.splitlines()]
    said = [line for line in lines if line and not line.startswith("For full helptext")]
    return " ".join(said[1:] if len(said) > 1 else said)
