"""Errors that the user can fix: the command line prints each as one line and exits with its code."""

WRITTEN_AGAIN = "delete DONE in its folder and run the command again"  # for files of a finished run


class UserError(Exception):
    """Base class; `exit_code` follows the convention of shells (2: bad usage)."""

    exit_code = 1


class ConfigError(UserError):
    """A key, value or combination of them that is not possible."""

    exit_code = 2


class DataError(UserError):
    """Missing, damaged or unexpected data."""


class RunError(UserError):
    """A run, or a file that one has left, that cannot be used."""


class RunInUseError(RunError):
    """A run directory that another process is at work in."""
