"""`jaxalign losses [NAME]`: the table of losses, or the page of one, from the functions alone."""

import inspect
from collections.abc import Callable, Sequence

from jaxalign.commands.arguments import parser
from jaxalign.errors import UserError
from jaxalign.losses import PREFERENCE_LOSSES, REWARD_LOSSES, TOKEN_LOSSES
from jaxalign.losses.table import (
    ONLINE_LOSSES,
    OTHER_LOSSES,
    STATE_LOSSES,
    loss_row,
    losses_markdown,
)
from jaxalign.online.algorithms import ALGORITHMS

LOSSES: dict[str, Callable] = PREFERENCE_LOSSES | TOKEN_LOSSES | REWARD_LOSSES


def main(arguments: Sequence[str]) -> int:
    """Print the table, as Markdown with --markdown, or one loss's documentation."""
    flags = parser("losses", "The table of preference losses, made from the functions themselves.")
    flags.add_argument("name", nargs="?", help="print this loss's page instead")
    flags.add_argument("--markdown", action="store_true", help="print docs/losses.md")
    given = flags.parse_args(arguments)
    from rich.console import Console

    console = Console(soft_wrap=True)
    if given.name is not None:
        every = ALGORITHMS | LOSSES | ONLINE_LOSSES | STATE_LOSSES | OTHER_LOSSES
        if given.name not in every:
            raise UserError(f"{given.name!r} is not one of {', '.join(sorted(every))}")
        loss = every[given.name]
        console.print(f"{given.name}{inspect.signature(loss)}\n", markup=False, highlight=False)
        console.print(inspect.getdoc(loss) or "", markup=False, highlight=False)
        return 0
    if given.markdown:
        console.print(losses_markdown(), markup=False, highlight=False, end="")
        return 0
    print_rows([loss_row(name, loss) for name, loss in LOSSES.items()])
    print_algorithms()
    return 0


def print_algorithms() -> None:
    """Name, what it does and hyperparameters, one online algorithm a row."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    for name in ("online algorithm", "what it is", "hyperparameters"):
        table.add_column(name, overflow="fold")
    for name, algorithm in ALGORITHMS.items():
        summary = (inspect.getdoc(algorithm) or "").splitlines()[0]
        parameters = inspect.signature(algorithm).parameters.values()
        defaults = ", ".join(f"{one.name}={one.default:g}" for one in parameters)
        table.add_row(*map(Text, (name, summary, defaults)))
    Console().print(table)


def print_rows(rows: Sequence) -> None:
    """Name, formula, hyperparameters and paper, one loss a row."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    for name in ("loss", "formula", "hyperparameters", "source"):
        table.add_column(name, overflow="fold")
    for row in rows:
        # Text: the formulas' brackets are no markup
        table.add_row(*map(Text, (row.name, row.formula, row.hyperparameters, row.source)))
    Console().print(table)
