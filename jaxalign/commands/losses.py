"""`jaxalign losses [NAME]`: the table of losses, or the page of one."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxalign.errors import UserError
from jaxalign.flags import parse
from jaxalign.losses import LOSSES
from jaxalign.losses.table import defaults_of, losses_markdown, losses_table, typed
from jaxalign.online.algorithms import ALGORITHMS


@dataclass(frozen=True, kw_only=True)
class Options:
    """The table of losses and online algorithms, made from the functions themselves."""

    name: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="NAME")]] = None
    """Loss or online algorithm whose page is printed instead of the table."""
    markdown: bool = False
    """Whether to print docs/losses.md instead."""


def main(arguments: Sequence[str]) -> int:
    """Print the table, as Markdown with --markdown, or one function's documentation."""
    options = parse(Options, "losses", arguments)
    if options.name is not None:
        print_page(options.name)
    elif options.markdown:
        print(losses_markdown(), end="")
    else:
        rows = losses_table("pairs", "policy_pairs", "tokens", "scores", "labelled")
        print_table(
            ("loss", "formula", "hyperparameters", "source"),
            [(row.name, row.formula, row.hyperparameters, row.source) for row in rows],
        )
        print_table(
            ("online algorithm", "what it is", "hyperparameters"),
            [
                (name, (inspect.getdoc(make) or "").splitlines()[0], typed(defaults_of(make)))
                for name, make in ALGORITHMS.items()
            ],
        )
    return 0


def print_page(name: str) -> None:
    """Print the signature and the docstring of a loss or an online algorithm.

    Raises:
      UserError: there is none of that name.
    """
    functions = ALGORITHMS | {loss.name: loss.function for loss in LOSSES}
    if name not in functions:
        raise UserError(f"{name!r} is not one of {', '.join(sorted(functions))}")
    function = functions[name]
    print(f"{name}{inspect.signature(function)}\n\n{inspect.getdoc(function) or ''}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose cells are folded to the width of the terminal."""
    table = Table(show_lines=True)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: brackets in formulas are not markup
    Console().print(table)
