"""Flags: nearest names, defaults in the help, ranges, and what does not go with a loss."""

import argparse
import ast
import dataclasses
import importlib
import inspect
import io
import itertools
import os
import subprocess
import sys
import typing
from dataclasses import MISSING

import pytest

from jaxalign.cli import COMMANDS, main
from jaxalign.commands.arguments import Flags
from jaxalign.commands.experiment import load_config, parse
from jaxalign.config import EntanglementConfig

QUICKSTART = "experiments/quickstart.py"
BEGINNINGS = {
    "convert": ["a", "b"],
    "losses": [],
    "report": ["a"],
    "entangle": ["--model", "m", "--data", "d"],
    "plan": [QUICKSTART, "--topology", "v5e:2x2"],
    "filter": ["--model", "m", "--data", "d", "--output", "o"],
    "generate": ["--model", "m", "--prompts", "p", "--output", "o"],
    "collect": ["best-of-n", "--model", "m", "--prompts", "p", "--output", "o", "--annotator", "a"],
    "optimize-prompt": ["--model", "m", "--seeds", "s"],
    "judge": ["--judge", "j"],
    "train": [QUICKSTART],
}
WRONG = {
    "losses": ("--markdwon", "--markdown"),
    "report": ("--ouput", "--output"),
    "convert": ("--stepp", "--step"),
    "train": ("--sft.optimizer.learning-rat", "--sft.optimizer.learning-rate"),
    "plan": ("--preference.batchsize", "--preference.batch-size"),
    "entangle": ("--max-lenght", "--max-length"),
    "filter": ("--max_length", "--max-length"),
    "generate": ("--max-token", "--max-tokens"),
    "collect": ("--sampels", "--samples"),
    "optimize-prompt": ("--iteration", "--iterations"),
    "judge": ("--outptus", "--outputs"),
}


UNCONVERTED = [name for name in COMMANDS if name not in ("train", "losses")]
"""Commands whose flags are an argparse parser still."""
CONVERTED = ["losses"]
"""Commands whose flags are the fields of their module's `Options`."""


def error_of(capsys, *arguments):
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    (line,) = err.strip().splitlines()
    assert out == ""
    return line


def parser_of(command):
    """The argument parser of a command, caught before it parses."""
    found = []
    module = importlib.import_module(COMMANDS[command])
    kept = Flags.parse_known_args

    def caught(self, *_, **__):
        found.append(self)
        raise KeyboardInterrupt

    Flags.parse_known_args = caught
    try:
        module.main(BEGINNINGS[command])
    except KeyboardInterrupt:
        pass
    finally:
        Flags.parse_known_args = kept
    return found[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_flag_is_told_the_nearest(capsys, command):
    wrong, right = WRONG[command]
    line = error_of(capsys, command, *BEGINNINGS[command], wrong, "3")
    assert line.startswith(f"jaxalign {command}: unknown flag {wrong}; did you mean ")
    assert right in line


def test_an_unknown_command_is_told_the_nearest(capsys):
    assert "did you mean generate?" in error_of(capsys, "generat")
    assert "see --help" in error_of(capsys, "xyzzy")


@pytest.mark.parametrize("command", UNCONVERTED)
def test_every_flag_has_a_text_and_shows_its_default(command):
    parsers, flags = [parser_of(command)], []
    for one in parsers:
        for action in one._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            else:
                flags.append((one, action))
    for one, action in flags:
        assert action.help, action.dest
        text = one._get_formatter()._expand_help(action)
        is_switch = isinstance(action, argparse._StoreTrueAction)
        if action.default not in (None, [], argparse.SUPPRESS) and not is_switch:
            assert "default" in text, action.dest


@pytest.mark.parametrize("command", UNCONVERTED)
def test_every_numeric_flag_refuses_what_is_none_and_what_is_out_of_range(command):
    parsers = [parser_of(command)]
    for one in parsers:
        for action in one._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            assert action.type not in (int, float), f"{action.dest} has no range"
            if getattr(action.type, "__name__", "") != "parse":
                continue
            for text in ("nan", "inf", "-inf", "-1", "x", ""):
                with pytest.raises(argparse.ArgumentTypeError, match="is not"):
                    action.type(text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("judge", "--judge", "j", "--most", "0"), "--most: 0 is not in [1, inf)"),
        (("judge", "--judge", "j", "--most", "two"), "--most: 'two' is not a whole number"),
        (("judge", "--judge", "j", "--confidence", "1"), "--confidence: 1 is not in (0, 1)"),
        (("judge", "--judge", "j", "x"), "unexpected argument 'x'"),
        (("judge", "--a", "a"), "the following arguments are required: --judge"),
        (("judge", "--jugde", "a"), "unknown flag --jugde; did you mean --judge"),
        (("convert", "a", "b", "--dtype", "int8"), "--dtype: invalid choice: 'int8'"),
        (("collect", "best"), "invalid choice: 'best'"),
        (("train", QUICKSTART, "--scale=huge"), "--scale: 'huge' is not one of tiny, paper"),
    ],
)
def test_wrong_flags_take_one_line(capsys, arguments, said):
    assert said in error_of(capsys, *arguments)


def test_what_does_not_go_with_a_loss_is_switched_off_unless_it_was_typed(capsys):
    assert load_config(QUICKSTART, "tiny").entanglement.every == 1
    for loss in ("bradley_terry", "tdpo1"):
        config = parse([QUICKSTART, "--loss", loss])
        assert config.entanglement == EntanglementConfig()
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"{QUICKSTART}: entanglement: switched off; {loss} ")
    assert parse([QUICKSTART, "--loss=ipo"]).entanglement.every == 1
    line = error_of(
        capsys, "train", QUICKSTART, "--loss", "bradley_terry", "--entanglement.every", "1"
    )
    assert "entanglement.every: bradley_terry trains scores" in line


def test_a_warm_up_is_no_longer_than_the_steps_that_were_typed(capsys):
    config = parse([QUICKSTART, "--preference.steps", "3"])
    assert config.preference.optimizer.warmup_steps == 3
    assert "preference.optimizer.warmup_steps: 3, as" in capsys.readouterr().err
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


@pytest.mark.parametrize("command", UNCONVERTED)
def test_help_texts_are_noun_phrases_that_stand_alone(command):
    parsers = [parser_of(command)]
    for one in parsers:
        for action in one._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
                continue
            text = action.help or ""
            first = text.split()[0]
            assert len(text.split()) > 1, f"{action.dest}: {text}"
            assert first not in {"of", "for", "on", "at", "who", "whose", "how"}, action.dest


@pytest.mark.parametrize("command", CONVERTED)
def test_every_field_has_a_text_that_stands_alone_and_shows_its_default(command, capsys):
    options = importlib.import_module(COMMANDS[command]).Options
    texts = [
        ast.literal_eval(below.value)
        for field, below in itertools.pairwise(ast.parse(inspect.getsource(options)).body[0].body)
        if isinstance(field, ast.AnnAssign)
    ]
    assert len(texts) == len(dataclasses.fields(options))
    for text in texts:
        assert len(text.split()) > 1, text
        assert text.split()[0] not in {"of", "for", "on", "at", "who", "whose", "how"}, text
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    defaults = [one for one in dataclasses.fields(options) if one.default is not MISSING]
    assert shown.count("default: ") >= len(defaults)


@pytest.mark.parametrize("command", CONVERTED)
def test_every_numeric_field_has_a_range(command):
    options = importlib.import_module(COMMANDS[command]).Options
    hints = typing.get_type_hints(options, include_extras=True)
    assert not {int, float} & set(hints.values())
