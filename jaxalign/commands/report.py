"""`jaxalign report RUN [RUN ...]`: tables and plots of runs, side by side."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from jaxalign.errors import UserError, notice
from jaxalign.files import check_output
from jaxalign.flags import parse
from jaxalign.reporting import comparison, print_table, read_run, write_report
from jaxalign.reporting.runs import faults


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Tables and curves of runs, side by side: report.md with figures, and index.html."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders made by jaxalign train."""
    output: Path | None = None
    """Folder of the report; None: RUN/report, or ./report for several runs."""


def main(arguments: Sequence[str]) -> int:
    """Print the table and write the report."""
    options = parse(Options, "report", arguments)
    if not options.runs:
        raise UserError("the following arguments are required: RUN; see jaxalign report --help")
    runs = [read_run(folder) for folder in options.runs]
    folder = options.output or (runs[0].folder / "report" if len(runs) == 1 else Path("report"))
    check_output(folder, "--output", folder=True)
    for run in runs:
        for fault in faults(run):
            notice(fault)
    path = write_report(runs, folder)
    header, rows = comparison(runs)
    if rows:
        print_table(header, rows)
    print(f"report: {path}")
    print(f"page: {path.with_name('index.html')}")
    return 0
