"""The errors that commands show to users as one line, each with its exit code, and the wording that they share."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Collection
from types import ModuleType


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


def reason(error: BaseException) -> str:
    """Return what an error says, as the operating system has it or else as one short line."""
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return " ".join(text.split())[:300] or type(error).__name__


def optional(module: str, *, extra: str, package: str | None = None) -> ModuleType:
    """Import what only a part of the program needs, and the extra of that name installs.

    The package is called as its module where it is not given.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0]
        raise UserError(f"this needs {package}, of the extra [{extra}]: pip install {package}") from error


def did_you_mean(word: str, known: Collection[str]) -> str:
    """Return "; did you mean NAME?" for the nearest known name, or nothing."""
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else ""


# Control characters, among them the escape that begins a command to a terminal; those that reverse or break a line;
# and lone surrogates, by which Python stands for bytes of a file name that are not UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return a line that shows the unprintable characters of `text` as \xNN, \n, or \uNNNN.

    A name in the files of others must not command the terminal.
    """
    return _UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # os.fsdecode() of a byte
        return f"\\x{code - 0xDC00:02x}"
    return match[0].encode("unicode_escape").decode("ascii")
