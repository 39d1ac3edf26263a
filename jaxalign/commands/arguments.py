"""Flags of the commands: defaults in the help, ranges of numbers, one line for what is wrong."""

import argparse
import difflib
import typing
from collections.abc import Callable, Collection, Iterable
from typing import Any, NoReturn

from jaxalign.errors import UserError

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


def add_chat(flags: Any, help: str = "") -> None:
    """The flag of every command in which a model reads prompts; without a value it is always.

    Args:
      flags: a parser or a group of it.
      help: where it is not the rule of `jaxalign.data.plain_prompts`.
    """
    flags.add_argument(
        "--chat",
        nargs="?",
        choices=("auto", "always", "never"),
        const="always",
        default="auto",
        help=help
        or "whether plain prompts go through the tokenizer's chat template, as a user's turn; "
        "auto: where it has one, but not with a --prompt-format, and models trained here as they "
        "were trained",
    )


def add_bad_records(flags: argparse.ArgumentParser) -> None:
    """The flag of every command that reads rows."""
    flags.add_argument(
        "--bad-records",
        choices=("error", "skip"),
        default="error",
        help="response to a record that cannot be used: stop and name its line, or skip it",
    )
