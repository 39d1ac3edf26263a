"""The door: commands by name, and one-line errors for users."""

import sys
from collections.abc import Sequence

from jaxalign.errors import OutputError, UserError

USAGE = """usage: jaxalign COMMAND ...

commands:
  train EXPERIMENT [--field value ...]   run an experiment: a Python file or module with config()
  convert SOURCE TARGET                  run folder or checkpoint -> Hugging Face folder and back
  losses [NAME]                          the table of losses, or one loss's page
  report RUN [RUN ...]                   tables and plots of runs, side by side
  entangle --model M --data D            the gradients of chosen and rejected, as a page to read
  plan EXPERIMENT --topology SLICE       a step compiled for a TPU slice without owning one
  filter --model M --data D --output F   leave out pairs whose responses are too alike
  generate --model M --prompts F --output F   a model's responses to a file of prompts
  collect best-of-n | constitutional | society   preference data from models
  optimize-prompt --model M --seeds F    search for examples and a system prompt (DRPO)
  judge --a A --b B --judge J            outputs side by side: win rates, Elo, examples

jaxalign COMMAND --help tells more of each."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status.

    0 on success, 1 where an output could no longer be written (a full disk), 2 where the user can
    fix something, 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments.pop(0) if arguments else "--help"
    try:
        match command:
            case "train":
                from jaxalign.commands.train import main as run
            case "convert":
                from jaxalign.commands.convert import main as run
            case "losses":
                from jaxalign.commands.losses import main as run
            case "report":
                from jaxalign.commands.report import main as run
            case "entangle":
                from jaxalign.commands.entangle import main as run
            case "plan":
                from jaxalign.commands.plan import main as run
            case "filter":
                from jaxalign.commands.filter import main as run
            case "generate":
                from jaxalign.commands.generate import main as run
            case "collect":
                from jaxalign.commands.collect import main as run
            case "optimize-prompt":
                from jaxalign.commands.optimize_prompt import main as run
            case "judge":
                from jaxalign.commands.judge import main as run
            case "-h" | "--help":
                print(USAGE)
                return 0
            case "--version":
                from jaxalign import __version__

                print(f"jaxalign {__version__}")
                return 0
            case _:
                print(f"jaxalign: there is no command {command!r}\n\n{USAGE}", file=sys.stderr)
                return 2
        return run(arguments)
    except UserError as error:
        print(f"jaxalign {command}: {error}", file=sys.stderr)
        return 2
    except OutputError as error:
        print(f"jaxalign {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"jaxalign {command}: interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
