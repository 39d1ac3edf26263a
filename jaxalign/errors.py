"""Errors that are shown as one line, without a traceback."""

import sys


class UserError(ValueError):
    """Input that jaxalign cannot use; the message names the file, line or field and the mend."""


class OutputError(Exception):
    """An output that can no longer be written, as on a full disk: one line, exit status 1."""


def notice(text: str) -> None:
    """A line on standard error: what a user is to know of a command that does not end."""
    sys.stderr.write(f"jaxalign: {text}\n")
