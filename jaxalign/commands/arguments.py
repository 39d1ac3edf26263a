"""Flags of the commands: a dataclass whose fields are flags, and one line for what is wrong.

`parse` is for every command; the argparse parts below it are for commands that do not use it yet.
"""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal, NoReturn, TypeVar

from jaxalign.config import check
from jaxalign.errors import UserError

Chat = Literal["auto", "always", "never"]
"""Whether plain prompts go through the chat template; `--chat` without a value is always."""
Options = TypeVar("Options")
BadRecords = Literal["error", "skip"]
"""Response to a record that cannot be used: stop and name its line, or skip it."""


def parse(
    options: type[Options] | types.UnionType,
    command: str,
    arguments: Sequence[str],
    prog: str = "",
) -> Options:
    """The flags of a command, as a dataclass.

    Args:
      options: a frozen dataclass; its docstring is the description of the command, each field a
        flag (`tyro.conf.Positional`: an argument), the text below the field its help, and a `Range`
        in its annotation is checked. A field that is a dataclass adds that one's fields, without a
        prefix; a union of dataclasses makes subcommands.
      command: its name, for usage and errors.
      arguments: as typed.
      prog: usage, where it is not `jaxalign COMMAND`.

    Raises:
      UserError: one line that names the flag.
      SystemExit: --help.
    """
    import tyro

    check_names(arguments, flags_of(options), f"jaxalign {command} --help")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed: Any = tyro.cli(
                typing.cast(Any, options),
                args=_with_values(arguments),
                prog=prog or f"jaxalign {command}",
                description=inspect.getdoc(options) if inspect.isclass(options) else None,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )
    except SystemExit as left:
        if left.code == 0:
            raise
        raise UserError(
            f"{_complaint(complaint.getvalue())}; see jaxalign {command} --help"
        ) from None
    try:
        check(parsed)
    except UserError as error:
        name, colon, rest = str(error).partition(":")
        flag = name.rpartition(".")[2].partition("[")[0].replace("_", "-")
        raise UserError(f"--{flag}{colon}{rest}") from None
    return parsed


def flags_of(options: Any) -> list[str]:
    """The names of all flags of a dataclass, those in it and those of its subcommands too."""
    if dataclasses.is_dataclass(options):
        names = ["--help"]
        for name, hint in typing.get_type_hints(options, include_extras=True).items():
            inner = flags_of(hint)
            flag = name.replace("_", "-")
            switch = [f"--no-{flag}"] if _plain(hint) is bool else []
            names += inner or [f"--{flag}", *switch]
        return list(dict.fromkeys(names))
    if typing.get_origin(options) in (typing.Union, types.UnionType, typing.Annotated):
        parts = typing.get_args(options)
        parts = parts[:1] if typing.get_origin(options) is typing.Annotated else parts
        return list(dict.fromkeys(name for one in parts for name in flags_of(one)))
    return []


def _plain(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def _with_values(arguments: Sequence[str]) -> list[str]:
    """The arguments, with `always` after a `--chat` that has no value."""
    filled = []
    for at, text in enumerate(arguments):
        filled.append(text)
        if text == "--chat" and (at + 1 == len(arguments) or arguments[at + 1].startswith("-")):
            filled.append("always")
    return filled


NOT_A_NUMBER = re.compile(
    r"Error parsing (\S+):.*(invalid literal for int|could not convert string to float).*?: ('.*?')"
)
PLAIN_WORDS = (
    (
        r"invalid choice ('.*?') for argument '(.*?)'\. Expected one of \((.*)\)",
        r"\2: invalid choice: \1; choose from \3",
    ),
    (
        r"Error parsing (\S+): Could not parse arguments \[(.*?)\] into tuple type .*float.*",
        r"\1: one of \2 is not a number",
    ),
    (r"Missing value for argument '(.*?)'\. Expected .*", r"\1: the value is missing"),
    (r"Unrecognized options: (\S+).*", r"unexpected argument '\1'"),
    (r"Expected one of \{(.*)\}", r"no subcommand; choose from \1"),
)
"""What tyro says, and what we say."""


def _complaint(text: str) -> str:
    """What tyro objects to, in one line and without its frame."""
    lines = [line.strip(" │") for line in text.splitlines()]
    lines = [line for line in lines if not set(line) <= set("─╰╯-")][1:]  # the first is a title
    lines = list(itertools.takewhile(lambda x: not x.startswith("For full helptext"), lines))
    if lines and lines[0].startswith("Missing from"):
        names = [re.match(r"--[^ ,]+|[A-Z_]+$", line) for line in lines[1:]]
        flags = [name[0] for name in names if name]
        return f"the following arguments are required: {', '.join(flags)}"
    message = " ".join(lines).rstrip(".")
    if number := NOT_A_NUMBER.match(message):
        kind = "a whole number" if "int" in number[2] else "a number"
        return f"{number[1]}: {number[3]} is not {kind}"
    for pattern, words in PLAIN_WORDS:
        message = re.sub(pattern, words, message)
    return message


# ---------------------------------------------------------------------------- argparse

RENAMED = {"--strings-as-chat": "--chat always", "--no-strings-as-chat": "--chat never"}
"""Flags of earlier versions."""


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default that says something, where the text does not say it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False or action.default == []
        if says_nothing or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Flags(argparse.ArgumentParser):
    """An argument parser that raises a `UserError` of one line instead of leaving."""

    def __init__(self, **options: Any):
        super().__init__(**options, formatter_class=_Help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        check_names(args or (), self.names(), f"{self.prog} --help")
        given, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(f"unexpected argument {rest[0]!r}")
        return given

    def names(self) -> list[str]:
        """The names of all flags, those of subcommands too."""
        names = [name for name in self._option_string_actions if name.startswith("--")]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                names += [name for one in action.choices.values() for name in one.names()]
        return list(dict.fromkeys(names))


def parser(command: str, description: str) -> Flags:
    """An argument parser whose usage line reads `jaxalign COMMAND`."""
    return Flags(prog=f"jaxalign {command}", description=description)


def check_names(arguments: Iterable[str], known: Collection[str], where: str) -> None:
    """See to it that every flag is one of those that are known.

    Args:
      arguments: as typed.
      known: names with their dashes.
      where: the command that lists them.

    Raises:
      UserError: names the first that is not, and the nearest names.
    """
    for text in arguments:
        name = text.partition("=")[0]
        if name in RENAMED:
            raise UserError(f"{name}: is {RENAMED[name]} now")
        if name.startswith("--") and name not in known:
            raise UserError(f"unknown flag {name}{nearest(name, known) or f'; see {where}'}")


def nearest(name: str, known: Collection[str]) -> str:
    """The known names that look most like this one, as the end of a message."""
    found = difflib.get_close_matches(name.replace("_", "-"), known, n=3)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def within(annotation: Any) -> Callable[[str], float | int]:
    """The `type` of a flag that is a number: `within(AtLeastOne)`.

    Args:
      annotation: int or float annotated with a `Range`, as in the configs.
    """
    kind, allowed = typing.get_args(annotation)

    def parse(text: str) -> float | int:
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if value not in allowed:
            raise argparse.ArgumentTypeError(f"{text} is not in {allowed}")
        return value

    return parse
