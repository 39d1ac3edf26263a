"""The door: commands by name, and one-line errors for users."""

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from jaxalign.errors import OutputError, UserError, notice_once

COMMANDS = {
    name: f"jaxalign.commands.{name.replace('-', '_')}"
    for name in (
        *("train", "convert", "losses", "report", "runs", "entangle", "plan", "filter", "generate"),
        *("collect", "optimize-prompt", "judge"),
    )
}
"""Command -> its module, which is imported when the command is given."""

USAGE = """usage: jaxalign COMMAND ...

commands:
  train EXPERIMENT [--field value ...]   run an experiment: a Python file or module with config()
  convert SOURCE TARGET                  run folder or checkpoint -> Hugging Face folder and back
  losses [NAME]                          the table of losses, or one loss's page
  report RUN [RUN ...]                   tables, curves and a page of runs, side by side
  runs [FOLDER]                          the runs below a folder: how far, how well
  entangle --model M --data D            a page on the gradients of chosen and rejected
  plan EXPERIMENT --topology SLICE       a step compiled for a TPU slice without owning one
  filter --model M --data D --output F   leave out pairs whose responses are too similar
  generate --model M --prompts F --output F   a model's responses to a file of prompts
  collect METHOD --model M --prompts F --output D   preference data from models
  optimize-prompt --model M --seeds F    search for examples and a system prompt (DRPO)
  judge --a A --b B --judge J            outputs side by side: win rates, Elo, examples

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
        print(USAGE)
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
