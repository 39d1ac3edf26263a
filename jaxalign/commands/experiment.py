"""From an experiment's name and flags to its config."""

import contextlib
import io
import itertools
import sys
from collections.abc import Sequence

from jaxalign.config import TrainConfig, fields_of, with_fields
from jaxalign.config.fields import Sources
from jaxalign.errors import UserError
from jaxalign.flags import check_names, joined_lines, renamed
from jaxalign.models.folders import exported
from jaxalign.runs.experiment import fitted, load_config
from jaxalign.runs.rates import high_rates, is_large

STAGE_OF = {
    **{name: name for name in ("pretrain", "sft", "preference", "feedback", "online")},
    **{"representation": "representation", "alignment": "representation"},
    **{"sft_data": "sft", "text": "pretrain", "rollout": "online"},
}
"""First part of a flag's name -> the stage that reads it."""
WITH_ADAPTERS = ("sft", "preference", "feedback", "online")
"""Stages that train adapters if --lora.rank is set."""


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
    rest = renamed(rest, _names())
    typed: dict[str, str] = {}
    if not rest or rest[0].startswith("-"):
        if rest and rest[0] not in ("-h", "--help"):
            raise UserError(f"EXPERIMENT comes first, before {rest[0]}; see jaxalign train --help")
        config, experiment = TrainConfig(), "jaxalign train"
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
        check_names(rest, _names(), "jaxalign train --help")
        config, notes = fitted(config, typed)
        for note in notes:
            _tell(f"{experiment}: {note}")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), joined_lines():
            given = tyro.cli(
                TrainConfig,
                default=with_fields(config, loss_options={}, **{"rollout.options": {}}),
                args=rest,
                prog="jaxalign train EXPERIMENT [--scale tiny|paper]",
                description="Run an experiment; every field of its config can be set here.",
                config=(tyro.conf.OmitSubcommandPrefixes,),
            )
    except SystemExit as left:
        if left.code == 0:
            raise
        raise UserError(_in_one_line(left, complaint.getvalue())) from None
    if given.model != "embedded":
        given = with_fields(given, model=str(exported(given.model)))
    given_prompts = {"data", "rollout.prompts"} & set(typed)
    if given.online.runs and given_prompts == {"data"} and len(given.data or ()) > 1:
        raise UserError(
            "rollout.prompts: --data names several sources; set --rollout.prompts to the one whose "
            "prompts are sampled from"
        )
    if config.model == "embedded" != given.model:
        for name, high in high_rates(given).items():
            if f"{name}.optimizer.learning_rate" not in typed and is_large(given.model):
                raise UserError(
                    f"{name}.optimizer: {high} is this experiment's for a small model from random "
                    f"weights, and would wreck {given.model}; run experiments/finetune.py instead, "
                    f"or set --{name}.optimizer.learning-rate"
                )
    # the experiment's options belong to its own loss or algorithm, and to no other one
    loss, own = given.preference, config.preference
    if loss.loss == own.loss and not loss.loss_options:
        given = with_fields(given, loss_options=own.loss_options)
    elif loss.loss == own.loss and (dropped := sorted(own.loss_options.keys() - loss.loss_options)):
        left = ", ".join(f"{key} {own.loss_options[key]}" for key in dropped)
        _tell(f"{experiment}: loss_options: replaces its {left}; type it, too, to keep it")
    rollout, own = given.online.rollout, config.online.rollout
    if rollout.algorithm == own.algorithm:
        given = with_fields(given, **{"rollout.options": {**own.options, **rollout.options}})
    for name in typed:
        if why := _no_effect(given, name):
            _tell(f"{experiment}: {name}: has no effect, since {why}")
    return given


def _no_effect(config: TrainConfig, name: str) -> str | None:
    """Why a field of a config changes nothing; None: it does."""
    first = name.partition(".")[0]
    stage = STAGE_OF.get(first)
    if stage and not getattr(config, stage).runs and not name.endswith((".steps", ".epochs")):
        return f"the {stage} stage does not run; set its epochs"
    if first == "architecture" and config.model != "embedded":
        return f"the architecture is that of {config.model}"
    if first == "lora" and not config.lora.rank and name != "lora.rank":
        return "no adapters are trained; set --lora.rank"
    if first == "lora" and not any(getattr(config, stage).runs for stage in WITH_ADAPTERS):
        return "no stage that runs trains adapters"
    sources = _sources(config)
    if name == "data_temperature" and all(len(train) < 2 for train, _ in sources):
        return "no stage that runs mixes sources of records"
    pairs = _listed(config.eval_data)
    if name == "eval_data" and all(held_out != pairs for _, held_out in sources):
        return "no stage that runs evaluates on pairs of the run"
    if name == "holdout" and all(held_out for _, held_out in sources):
        return "no stage that runs holds records of its sources out"
    return None


def _sources(config: TrainConfig) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Sources of the training and of the held-out records of each stage that runs on records."""
    pairs = _listed(config.data), _listed(config.eval_data)
    rollout = config.online.rollout
    train, held_out = config.labelled_sources()
    of_stage = {
        "sft": (_listed(config.sft.data), ()) if config.sft.data else pairs,
        "preference": pairs,
        "feedback": (_listed(train), _listed(held_out)),
        "representation": pairs,
        "online": (_listed(rollout.prompts), _listed(rollout.eval_prompts)),
    }
    running = [name for name, stage in config.stages().items() if stage.runs]
    return [of_stage[name] for name in running if name in of_stage]


def _listed(sources: Sources) -> tuple[str, ...]:
    return (sources,) if isinstance(sources, str) else tuple(sources or ())


def _tell(note: str) -> None:
    print(note, file=sys.stderr)


def _typed(arguments: Sequence[str]) -> dict[str, str]:
    """Field -> the first value of it on the command line; "" where none follows."""
    typed = {}
    for text, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if text.startswith("--"):
            name, equals, value = text[2:].partition("=")
            typed[name.replace("-", "_")] = value if equals else following
    return typed


def _names() -> list[str]:
    """The flags of a run's fields."""
    names = ["--help"]
    for field in fields_of(TrainConfig):
        outer, dot, name = field.name.replace("_", "-").rpartition(".")
        if not field.is_config:
            names += [f"--{outer}{dot}{name}"]
            names += [f"--{outer}{dot}no-{name}"] if field.hint is bool else []
    return names


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
