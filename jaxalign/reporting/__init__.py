"""Tables and plots from recorded runs: run folders in, Markdown and PNG out."""

from jaxalign.reporting.report import comparison, read_run, write_report

__all__ = ["comparison", "read_run", "write_report"]
