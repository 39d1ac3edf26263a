"""`jaxalign report RUN [RUN ...]`: a table and plots of runs, side by side."""

from collections.abc import Sequence
from pathlib import Path

from jaxalign.commands.arguments import parser
from jaxalign.reporting import comparison, read_run, write_report


def main(arguments: Sequence[str]) -> int:
    """Print the table and write report.md with its plots."""
    flags = parser("report", "Tables and plots of runs, side by side.")
    flags.add_argument("runs", nargs="+", metavar="RUN", help="folder made by jaxalign train")
    flags.add_argument(
        "--output", type=Path, help="folder of the report (default: RUN/report, or ./report)"
    )
    given = flags.parse_args(arguments)
    runs = [read_run(folder) for folder in given.runs]
    folder = given.output or (runs[0].folder / "report" if len(runs) == 1 else Path("report"))
    path = write_report(runs, folder)
    header, rows = comparison(runs)
    if rows:
        print_table(header, rows)
    from rich import print as show

    show(f"report: {path}")
    return 0


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The table in the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for at, name in enumerate(header):  # folded: a name cut off at "llmbar/Adve…" says little
        table.add_column(name, justify="right" if at else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
