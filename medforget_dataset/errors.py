"""The one exception that the command line turns into a single line and exit code 2."""


class UserError(ValueError):
    """Something the caller can mend: the message names the file, row, flag or value at fault and what to do."""
