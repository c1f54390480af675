"""What a user can cause: one base class, which the command line turns into a message and a status."""


class UserError(Exception):
    """Bad input. The message says what was got, what is needed and what to change."""

    status = 1
    """Of the process that it ends: 1 for files and requests, 2 for a configuration."""
    on_all_ranks = False
    """Whether every rank finds the same, so that one speaks for all; else each says which it is."""


class InputError(UserError, ValueError):
    """A request that cannot be met: an unknown word, a step count, no caption; the message says got, need and fix."""


class InstallationError(UserError):
    """A library is not of a version that the program knows."""
