"""Tables, charts and pages of recorded runs: run folders in, Markdown, PNG and HTML out."""

from jaxalign.reporting.report import comparison, write_report
from jaxalign.reporting.runs import read_run
from jaxalign.reporting.terminal import print_table

__all__ = ["comparison", "print_table", "read_run", "write_report"]
