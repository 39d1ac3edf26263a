"""From an experiment's name and flags to its config."""

import contextlib
import dataclasses
import inspect
import io
from collections.abc import Sequence

from jaxalign.config import TrainConfig
from jaxalign.errors import UserError
from jaxalign.modules import find_module

SCALES = ("tiny", "paper")


def load_config(name: str, scale: str) -> TrainConfig:
    """The config that the experiment's `config()` or `config(scale)` returns."""
    module = find_module(name, "experiment")
    function = getattr(module, "config", None)
    if not callable(function):
        raise UserError(f"{name}: has no function config() that returns a TrainConfig")
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

    rest = list(arguments)
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
