"""Errors that are the user's to mend: the command line prints each as one line and exits with its code."""

WRITTEN_AGAIN = "delete DONE beside it, and the same command writes it again"  # of what a finished run has left


class UserError(Exception):
    """Base class; `exit_code` follows the shell's custom (2: bad usage)."""

    exit_code = 1


class ConfigError(UserError):
    """A key, a value or a combination that cannot be run."""

    exit_code = 2


class DataError(UserError):
    """Data that is absent, damaged or not what its name says."""


class RunError(UserError):
    """A run directory that cannot be used."""
