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
from jaxalign.config import EntanglementConfig, StageConfig, TrainConfig
from jaxalign.errors import UserError
from jaxalign.losses import REWARD_LOSSES, TOKEN_LOSSES
from jaxalign.modules import find_module, users_code

SCALES = ("tiny", "paper")


def load_config(name: str, scale: str) -> TrainConfig:
    """The config that the experiment's `config()` or `config(scale)` returns."""
    module = find_module(name, "experiment")
    function = getattr(module, "config", None)
    if not callable(function):
        raise UserError(f"{name}: has no function config() that returns a TrainConfig")
    with users_code(f"{name}: config()"):
        takes_scale = "scale" in inspect.signature(function).parameters
        config = function(scale=scale) if takes_scale else function()
    if not isinstance(config, TrainConfig):
        raise UserError(f"{name}: config() returned {type(config).__name__}, not a TrainConfig")
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
            if scale not in SCALES:
                raise UserError(f"--scale: {scale!r} is not one of {', '.join(SCALES)}")
            del rest[at : at + 2]
        config = load_config(experiment, scale)
        check_names(rest, _names(TrainConfig), "jaxalign train --help")
        config, notes = fitted(config, _typed(rest))
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
    notes: list[str] = []
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
        if stage.steps and f"{name}.steps" not in typed and loss in REWARD_LOSSES:
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
