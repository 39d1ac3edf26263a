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
from jaxalign.losses import LOSSES, PREFERENCE_LOSSES, Loss, members_in, members_of
from jaxalign.losses.lookup import find_loss
from jaxalign.losses.table import defaults_of, loss_row, losses_markdown, losses_table, typed
from jaxalign.online.algorithms import ALGORITHMS


@dataclass(frozen=True, kw_only=True)
class Options:
    """The table of losses and online algorithms, made from the functions themselves."""

    name: tyro.conf.Positional[
        Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME[:WEIGHT] ...]")]
    ] = ()
    """Loss or online algorithm whose page is printed instead of the table; several losses with
    weights, as `--loss` takes them, print the page of their sum."""
    markdown: bool = False
    """Whether to print docs/losses.md instead."""


def main(arguments: Sequence[str]) -> int:
    """Print the table, as Markdown with --markdown, or one function's documentation."""
    options = parse(Options, "losses", arguments)
    if options.name:
        print_page(" ".join(options.name))
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
    """Print the signature and the docstring of a loss, a mixture or an online algorithm.

    Raises:
      UserError: there is none of that name.
    """
    if members := members_in(name, PREFERENCE_LOSSES):
        print(mixture_page(members))
        return
    functions = ALGORITHMS | {loss.name: loss.function for loss in LOSSES}
    if name not in functions:
        raise UserError(f"{name!r} is not one of {', '.join(sorted(functions))}")
    function = functions[name]
    print(f"{name}{inspect.signature(function)}\n\n{inspect.getdoc(function) or ''}")


def mixture_page(members: Sequence[tuple[str, float]]) -> str:
    """Formula, coefficients and options of a weighted sum of losses, and what each member is.

    Raises:
      UserError: the losses cannot be mixed.
    """
    loss = find_loss(" ".join(f"{name}:{weight}" for name, weight in members), {})
    lines = [loss.name, ""]
    for (name, weight), (label, member) in zip(
        members, members_of(loss.function).items(), strict=True
    ):
        row = loss_row(Loss(member, "pairs"))
        lines.append(f"{weight:g} * {name}: {row.summary}")
        lines += [f"    {row.formula}"] if row.formula else []
        lines += [f"    d_w / d_l = {row.slopes}"] if row.slopes else []
        options = {f"{label}.{option}": default for option, default in row.defaults.items()}
        lines.append(f"    options: {typed(options) or 'none'}")
        lines += [f"    {row.source}"] if row.source else []
    lines += ["", "The coefficients d_w and d_l of the sum are the sums of the members', weighted."]
    return "\n".join(lines)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose cells are folded to the width of the terminal."""
    table = Table(show_lines=True)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: brackets in formulas are not markup
    Console().print(table)
