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
    """The table in the terminal; below one another where its columns do not fit side by side."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for columns in fitting(header, rows, console.width):
        table = Table()
        for at in columns:  # folded: a name cut off at "llmbar/Adve…" says little
            table.add_column(header[at], justify="right" if at else "left", overflow="fold")
        for row in rows:
            table.add_row(*(row[at] for at in columns))
        console.print(table)


def fitting(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> list[tuple[int, ...]]:
    """Columns of tables that break no number at this width; each begins with the first column.

    Args:
      header: names of the columns; long words in them and in the first column may be broken.
      rows: cells.
      width: characters of a line.
    """
    frame = 3  # of a column: its border and the spaces beside its text

    def needed(at: int) -> int:
        words = [word for row in rows for word in row[at].split()]
        longest = max(map(len, words), default=0)
        own = max(map(len, header[at].split()), default=0)
        return frame + (min(max(longest, own), 16) if at == 0 else max(longest, min(own, 12)))

    parts: list[tuple[int, ...]] = []
    used = width
    for at in range(1, len(header)):
        if used + needed(at) > width:
            parts.append((0,))
            used = 1 + needed(0)
        parts[-1] += (at,)
        used += needed(at)
    return parts or [(0,)]
