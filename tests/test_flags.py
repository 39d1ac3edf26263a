"""Flags: nearest names, defaults in the help, ranges, and what does not go with a loss."""

import argparse
import dataclasses
import importlib
import io
import os
import subprocess
import sys
import typing
from types import UnionType

import pytest
import tyro

from jaxalign import flags
from jaxalign.cli import COMMANDS, main
from jaxalign.commands.experiment import parse
from jaxalign.config import EntanglementConfig, Range
from jaxalign.errors import UserError
from jaxalign.runs.experiment import load_config

QUICKSTART = "experiments/quickstart.py"
BEGINNINGS = {
    "convert": ["a", "b"],
    "losses": [],
    "report": ["a"],
    "runs": [],
    "evaluate": ["--model", "m", "--data", "d"],
    "entangle": ["--model", "m", "--data", "d"],
    "plan": [QUICKSTART, "--topology", "v5e:2x2"],
    "filter": ["--model", "m", "--data", "d", "--output", "o"],
    "steer": ["--model", "m", "--data", "d", "--output", "o"],
    "generate": ["--model", "m", "--prompts", "p", "--output", "o"],
    "collect": ["best-of-n", "--model", "m", "--prompts", "p", "--output", "o", "--annotator", "a"],
    "optimize-prompt": ["--model", "m", "--seeds", "s"],
    "judge": ["--judge", "j"],
    "data": ["d", "--tokenizer", "t"],
    "train": [QUICKSTART],
}
WRONG = {
    "losses": ("--markdwon", "--markdown"),
    "report": ("--ouput", "--output"),
    "runs": ("--jsno", "--json"),
    "evaluate": ("--refrence", "--reference"),
    "convert": ("--stepp", "--step"),
    "train": ("--sft.optimizer.learning-rat", "--sft.optimizer.learning-rate"),
    "plan": ("--preference.batchsize", "--preference.batch-size"),
    "entangle": ("--max-lenght", "--max-length"),
    "filter": ("--max_length", "--max-length"),
    "steer": ("--factor", "--factors"),
    "generate": ("--max-token", "--max-tokens"),
    "collect": ("--sampels", "--samples"),
    "optimize-prompt": ("--iteration", "--iterations"),
    "judge": ("--outptus", "--outputs"),
    "data": ("--tokenzier", "--tokenizer"),
}


def error_of(capsys, *arguments):
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    (line,) = err.strip().splitlines()
    assert out == ""
    return line


def parser_of(command):
    """The argument parser that tyro makes of a command's `Options`."""
    module = importlib.import_module(COMMANDS[command])
    plain = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    with (
        flags.joined_lines()
    ):  # as commands do: tyro keeps help texts, and compares some with new ones
        return tyro.extras.get_parser(module.Options, config=plain)


def flags_of(command):
    """Every flag of a command and of its subcommands, with its help text as it is printed."""
    parsers = [parser_of(command)]
    for one in parsers:
        for action in one._actions:
            if type(action).__name__ == "_SubParsersAction":
                parsers += action.choices.values()
            else:
                yield action, action.help


def fields_of(options):
    """Name and annotation of every field of a dataclass, and of those in it."""
    if typing.get_origin(options) in (typing.Annotated, typing.Union, UnionType):
        for one in typing.get_args(options):
            yield from fields_of(one)
    elif dataclasses.is_dataclass(options) and isinstance(options, type):
        for name, hint in typing.get_type_hints(options, include_extras=True).items():
            inner = list(fields_of(hint))
            yield from inner or [(name, hint)]


def numbers_of(hint):
    """The numbers in an annotation, each with its ranges."""
    if hint in (int, float):
        yield hint, []
    elif typing.get_origin(hint) is typing.Annotated:
        for number, ranges in numbers_of(typing.get_args(hint)[0]):
            yield number, ranges + [x for x in typing.get_args(hint)[1:] if isinstance(x, Range)]
    elif typing.get_origin(hint) is not typing.Literal:
        for one in typing.get_args(hint):
            yield from numbers_of(one)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_flag_is_told_the_nearest(capsys, command):
    wrong, right = WRONG[command]
    line = error_of(capsys, command, *BEGINNINGS[command], wrong, "3")
    assert line.startswith(f"jaxalign {command}: unknown flag {wrong}; did you mean ")
    assert right in line


def test_an_unknown_command_is_told_the_nearest(capsys):
    assert "did you mean generate?" in error_of(capsys, "generat")
    assert "see --help" in error_of(capsys, "xyzzy")


@pytest.mark.parametrize("command", [x for x in COMMANDS if x != "train"])
def test_every_flag_has_a_text_and_shows_its_default(command):
    for action, text in flags_of(command):
        assert text, action.dest
        is_switch = isinstance(action, argparse._StoreTrueAction)
        has_default = action.default not in (None, [], argparse.SUPPRESS)
        if has_default and not action.required and action.option_strings and not is_switch:
            assert "default" in text or "repeatable" in text, action.dest


@pytest.mark.parametrize("command", [x for x in COMMANDS if x != "train"])
def test_every_numeric_flag_refuses_what_is_none_and_what_is_out_of_range(command):
    wrong = ("nan", "inf", "-inf", "-1", "x", "")
    options = importlib.import_module(COMMANDS[command]).Options
    for name, hint in fields_of(options):
        numbers = list(numbers_of(hint))
        assert all(ranges for _, ranges in numbers), f"{name} has no range"
        if not numbers:
            continue
        alone = dataclasses.make_dataclass("Alone", [(name, hint)], frozen=True, kw_only=True)
        number = name.replace("_", "-")
        for text in wrong:
            two = [f"--{number}", "1", text] if typing.get_origin(hint) is tuple else None
            with pytest.raises(UserError, match=f"^--{number}: .* is not"):
                flags.parse(alone, command, two or [f"--{number}={text}"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("judge", "--judge", "j", "--limit", "0"), "--limit: 0 is not in [1, inf)"),
        (("judge", "--judge", "j", "--most", "two"), "--limit: 'two' is not a whole number"),
        (("judge", "--judge", "j", "--confidence", "1"), "--confidence: 1.0 is not in (0, 1)"),
        (("judge", "--judge", "j", "x"), "unexpected argument 'x'"),
        (("judge", "--a", "a"), "the following arguments are required: --judge"),
        (("judge", "--jugde", "a"), "unknown flag --jugde; did you mean --judge"),
        (("convert", "a", "b", "--dtype", "int8"), "--dtype: invalid choice: 'int8'"),
        (("collect", "best"), "'best'"),
        (("train", QUICKSTART, "--scale=huge"), "--scale: 'huge' is not one of tiny, paper"),
    ],
)
def test_wrong_flags_take_one_line(capsys, arguments, said):
    assert said in error_of(capsys, *arguments)


def test_what_does_not_go_with_a_loss_is_switched_off_unless_it_was_typed(capsys):
    assert load_config(QUICKSTART, "tiny").preference.entanglement.every == 1
    for loss in ("bradley_terry", "tdpo1"):
        config = parse([QUICKSTART, "--loss", loss])
        assert config.preference.entanglement == EntanglementConfig()
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"{QUICKSTART}: entanglement: switched off; {loss} ")
    assert parse([QUICKSTART, "--loss=ipo"]).preference.entanglement.every == 1
    line = error_of(
        capsys, "train", QUICKSTART, "--loss", "bradley_terry", "--entanglement.every", "1"
    )
    assert "entanglement.every: bradley_terry trains scores" in line


def test_a_warm_up_is_no_longer_than_the_steps_that_were_typed(capsys):
    config = parse([QUICKSTART, "--preference.steps", "3"])
    assert config.preference.optimizer.warmup_steps == 3
    assert "preference.optimizer.warmup_steps: 3, the number of steps" in capsys.readouterr().err
    flags = ("--preference.steps", "3", "--preference.optimizer.warmup-steps", "4")
    line = error_of(capsys, "train", QUICKSTART, *flags)
    assert "preference.optimizer.warmup_steps: 4 is more than preference.steps: 3" in line


@pytest.mark.parametrize("command", [*COMMANDS, None])
def test_a_closed_pipe_is_no_error(command, monkeypatch, capsys):
    class Closed(io.StringIO):
        def flush(self):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("sys.stdout", Closed())
    assert main([*([command] if command else []), "--help"]) == 141
    assert capsys.readouterr().err == ""


def test_a_pipe_that_closes_while_python_leaves_is_no_error():
    read, write = os.pipe()
    code = "import sys; from jaxalign.cli import main; sys.exit(main(['--help']))"
    done = subprocess.Popen([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE)
    os.close(read)
    os.close(write)
    assert done.communicate()[1] == b""
    assert done.returncode == 141


def test_runs_of_every_experiment_land_in_the_same_folder():
    """`--name x` is runs/x, whatever the experiment."""
    from tests.commands.test_command_line import EXPERIMENTS

    folders = {name: parse([name, "--name", "x"]).output for name in EXPERIMENTS}
    assert set(folders.values()) == {"runs"}, folders


@pytest.mark.parametrize("command", [x for x in COMMANDS if x != "train"])
def test_help_texts_are_noun_phrases_that_stand_alone(command):
    for action, text in flags_of(command):
        first = text.split()[0].lower()
        assert len(text.partition("(default")[0].split()) > 1, f"{action.dest}: {text}"
        assert first not in {"of", "for", "on", "at", "who", "whose", "how"}, action.dest
