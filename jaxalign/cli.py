"""The command line: commands by name, and one-line errors for users."""

import ast
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from jaxalign.errors import OutputError, UserError, notice_once

COMMANDS = {
    name: f"jaxalign.commands.{name.replace('-', '_')}"
    for name in (
        *("train", "evaluate", "runs", "report", "losses", "convert", "plan", "entangle", "filter"),
        *("steer", "generate", "judge", "collect", "optimize-prompt", "data"),
    )
}
"""Command -> its module, which is imported when the command is given."""


def usage() -> str:
    """What `jaxalign --help` prints: the first line of each command's module, not imported."""
    lines = []
    for module in COMMANDS.values():
        path = Path(__file__).parent / "commands" / f"{module.rpartition('.')[2]}.py"
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        command, _, about = text.splitlines()[0].partition(": ")
        lines.append((command.strip("`").removeprefix("jaxalign "), about.rstrip(".")))
    width = max(len(command) for command, _ in lines)
    commands = "\n".join(f"  {command:<{width}}  {about}" for command, about in lines)
    return f"""usage: jaxalign COMMAND ...

commands:
{commands}

jaxalign COMMAND --help lists a command's flags; --debug, or JAXALIGN_DEBUG=1, shows tracebacks."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status.

    0 on success, 1 where an output could no longer be written (a full disk), 2 where the user can
    fix something, 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or os.environ.get("JAXALIGN_DEBUG", "0") not in ("", "0")
    arguments = [text for text in arguments if text != "--debug"]
    command = arguments.pop(0) if arguments else "--help"
    notice_once.cache_clear()
    try:
        try:
            return _run(command, arguments)
        finally:
            sys.stdout.flush()  # a closed pipe is noticed here, not when Python leaves
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"jaxalign {command}: {error}", file=sys.stderr)
        return 2
    except OutputError as error:
        if debug:
            traceback.print_exc()
        print(f"jaxalign {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"jaxalign {command}: interrupted; run the same command again to resume",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` has
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (flushed at exit)
        return 141


def _run(command: str, arguments: Sequence[str]) -> int:
    if command in ("-h", "--help"):
        print(usage())
        return 0
    if command == "--version":
        from jaxalign import __version__

        print(f"jaxalign {__version__}")
        return 0
    if command not in COMMANDS:
        near = " or ".join(difflib.get_close_matches(command, COMMANDS))
        raise UserError(
            "there is no such command" + (f"; did you mean {near}?" if near else "; see --help")
        )
    return importlib.import_module(COMMANDS[command]).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
