"""The errors that commands show to users as one line, each with its exit code."""

from __future__ import annotations


class CommandError(Exception):
    """What ends a command; the message is one line that names the thing and the way out."""

    exit_code = 1
    at_once = False  # whether to leave without the goodbye that other processes of the run would not answer


class UserError(CommandError, ValueError):
    """A mistake that the user can mend."""

    exit_code = 2


class DivergedError(CommandError):
    """The loss, the gradient or the state of a run is not finite."""


class BrokenDataError(CommandError):
    """Too many images of a data set cannot be read."""


class StorageError(CommandError):
    """A disk is full, read-only or broken; what was complete before stays."""


class LostProcessError(CommandError):
    """Another process of the run has ended; the exit code is that of JAX's own abort, 128 + SIGABRT."""

    exit_code = 134
    at_once = True


class Interrupted(CommandError):
    """A signal ended a run, which is saved; the exit code is the shell's for that signal."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum
