"""`jaxalign report RUN [RUN ...]`: a table and plots of runs, side by side."""

from collections.abc import Sequence
from pathlib import Path

from jaxalign.commands.arguments import parser
from jaxalign.errors import notice
from jaxalign.files import check_output
from jaxalign.reporting import comparison, read_run, write_report
from jaxalign.training.checkpoints import DIGESTS, damage


def main(arguments: Sequence[str]) -> int:
    """Print the table and write report.md with its plots."""
    flags = parser("report", "Tables and plots of runs, side by side.")
    flags.add_argument("runs", nargs="+", metavar="RUN", help="run folder made by jaxalign train")
    flags.add_argument(
        "--output", type=Path, help="folder of the report (default: RUN/report, or ./report)"
    )
    given = flags.parse_args(arguments)
    runs = [read_run(folder) for folder in given.runs]
    folder = given.output or (runs[0].folder / "report" if len(runs) == 1 else Path("report"))
    check_output(folder, "--output", folder=True)
    for run in runs:
        for fault in run.skipped:
            notice(f"{fault}; the line is left out of the report")
        for kept in sorted((run.folder / "checkpoints").glob(f"*/[0-9]*/{DIGESTS}")):
            if (fault := damage(kept.parent)) is not None:
                notice(f"{fault}; the checkpoint is damaged")
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
