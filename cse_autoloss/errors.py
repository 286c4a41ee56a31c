"""Errors that are a user's to mend."""


class UserError(ValueError):
    """One line: what was wrong, where, and what would be right. The command line prints it and
    nothing else."""


class SearchError(RuntimeError):
    """A search cannot go on: what happened, and what to change."""
