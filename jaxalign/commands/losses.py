"""`jaxalign losses [NAME]`: the table of losses, or the page of one, from the functions alone."""

import inspect
from collections.abc import Sequence

from jaxalign.commands.arguments import parser
from jaxalign.errors import UserError
from jaxalign.losses import PREFERENCE_LOSSES


def main(arguments: Sequence[str]) -> int:
    """Print the table, as Markdown with --markdown, or one loss's documentation."""
    flags = parser("losses", "The table of preference losses, made from the functions themselves.")
    flags.add_argument("name", nargs="?", help="print this loss's page instead")
    flags.add_argument("--markdown", action="store_true", help="print docs/losses.md")
    given = flags.parse_args(arguments)
    from rich.console import Console

    console = Console(soft_wrap=True)
    if given.name is not None:
        if given.name not in PREFERENCE_LOSSES:
            raise UserError(f"{given.name!r} is not one of {', '.join(sorted(PREFERENCE_LOSSES))}")
        loss = PREFERENCE_LOSSES[given.name]
        console.print(f"{given.name}{inspect.signature(loss)}\n", markup=False, highlight=False)
        console.print(inspect.getdoc(loss) or "", markup=False, highlight=False)
        return 0
    from jaxalign.losses.table import losses_markdown, losses_table

    if given.markdown:
        console.print(losses_markdown(), markup=False, highlight=False, end="")
        return 0
    print_rows(losses_table())
    return 0


def print_rows(rows: Sequence) -> None:
    """Name, formula, hyperparameters and paper, one loss a row."""
    from rich.console import Console
    from rich.table import Table

    table = Table("loss", "formula", "hyperparameters", "source", show_lines=True)
    for row in rows:
        table.add_row(row.name, row.formula, row.hyperparameters, row.source)
    Console().print(table, markup=False)
