"""The errors that commands show to users as one line, each with its exit code."""

from __future__ import annotations


class CommandError(Exception):
    """What ends a command; the message is one line that names the thing and the way out."""

    exit_code = 1


class UserError(CommandError, ValueError):
    """A mistake that the user can mend."""

    exit_code = 2


class DivergedError(CommandError):
    """The loss or the gradient of a run is not a finite number."""


class BrokenDataError(CommandError):
    """Too many images of a data set cannot be read."""


class Interrupted(CommandError):
    """A signal ended a run, which is saved; the exit code is the shell's for that signal."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum
