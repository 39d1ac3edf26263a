"""Flags of the commands: a dataclass whose fields are flags, and one line for what is wrong."""

import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar

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
    known = flags_of(options)
    arguments = renamed(arguments, known)
    check_names(arguments, known, f"jaxalign {command} --help")
    return _parse(options, command, arguments, prog)


def parse_known(
    options: type[Options], command: str, arguments: Sequence[str]
) -> tuple[Options, list[str]]:
    """As `parse`, and the arguments that are none of the dataclass's."""
    arguments = renamed(arguments, flags_of(options))
    return _parse(options, command, arguments, "", return_unknown_args=True)


def _parse(options: Any, command: str, arguments: Sequence[str], prog: str, **more: Any) -> Any:
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), joined_lines():
            result: Any = tyro.cli(
                options,
                args=_with_values(arguments),
                prog=prog or f"jaxalign {command}",
                description=inspect.getdoc(options) if inspect.isclass(options) else None,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
                **more,
            )
    except SystemExit as left:
        if left.code == 0:
            raise
        text = _complaint(complaint.getvalue())
        raise UserError(f"{text}; see jaxalign {command} --help") from None
    try:
        check(result[0] if more else result)
    except UserError as error:
        name, colon, rest = str(error).partition(":")
        flag = name.rpartition(".")[2].partition("[")[0].replace("_", "-")
        raise UserError(f"--{flag}{colon}{rest}") from None
    return result


@contextlib.contextmanager
def joined_lines() -> Iterator[None]:
    """Help texts as paragraphs: tyro keeps the line breaks of an indented docstring."""
    from tyro import _docstrings

    kept = getattr(_docstrings, "parse_docstring_from_object", None)
    if kept is None:  # another version of tyro; the breaks are only less pretty
        yield
        return

    def joined(cls: object) -> dict[str, str]:
        return {name: " ".join(text.split()) for name, text in kept(cls).items()}

    _docstrings.parse_docstring_from_object = joined
    try:
        yield
    finally:
        _docstrings.parse_docstring_from_object = kept


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


def renamed(arguments: Sequence[str], known: Collection[str]) -> list[str]:
    """The arguments, with the new names of flags that had another one in version 0.2."""
    names = {old: new for old, new in ALIASES.items() if new in known and old not in known}
    result = []
    for text in arguments:
        name, equals, value = text.partition("=")
        result.append(f"{names.get(name, name)}{equals}{value}")
    return result


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
    (
        r"Error parsing (\S+): Failed to parse key-value pairs.*",
        r"\1: it is not NAME VALUE pairs with a number for each name",
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


ALIASES = {"--most": "--limit", "--entanglement.cure": "--entanglement.reweighting"}
"""Old name -> new name of flags that still work under the old one."""
RENAMED = {"--strings-as-chat": "--chat always", "--no-strings-as-chat": "--chat never"}
"""Flags of earlier versions."""


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
