"""Tables and plots from recorded runs: run folders in, Markdown and PNG out."""

from jaxalign.reporting.report import comparison, write_report
from jaxalign.reporting.runs import read_run

__all__ = ["comparison", "read_run", "write_report"]
