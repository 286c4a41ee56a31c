"""Errors that are a user's to mend: the command line prints their one line, and no traceback."""


class UserError(ValueError):
    """What a user gave is wrong: what, where, and what would be right."""


class SearchError(RuntimeError):
    """Work that was begun cannot go on: what happened, and what to change."""
