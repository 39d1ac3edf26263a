"""The one kind of error that a user can mend: shown as one line, without a traceback."""


class UserError(ValueError):
    """Input that jaxalign cannot use; the message names the file, line or field and the mend."""
