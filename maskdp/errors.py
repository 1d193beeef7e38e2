"""The one exception that means "the user can fix this": shown as one line, without a traceback."""


class UserError(Exception):
    """A mistake in what the user gave. The message names the file or key, what was wrong and what was expected."""
