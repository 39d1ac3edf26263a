"""Errors that are shown as one line, without a traceback."""

import functools
import sys


class UserError(ValueError):
    """Input that jaxalign cannot use; the message names the file, line or field and the fix."""


class RecordError(UserError):
    """A record of which no text can be made, as when the chat template refuses its turns."""


class OutputError(Exception):
    """An output that can no longer be written, as on a full disk: one line, exit status 1."""


def notice(text: str) -> None:
    """A line on standard error: what a user is to know of a command that does not end."""
    sys.stderr.write(f"jaxalign: {text}\n")


@functools.cache
def notice_once(text: str) -> None:
    """A `notice` that is not repeated in the same command."""
    if not _ELSEWHERE:
        notice(text)


_ELSEWHERE: list[str] = []


def leave_notices_to(who: str) -> None:
    """Of several processes that would all say the same, another one says it."""
    _ELSEWHERE.append(who)
