"""One run at a time in a work directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from resnet_jax.errors import StorageError, UserError, reason

FILE_NAME = "lock"
_PATIENCE = 2.0  # seconds: a run that was killed right before may still be ending


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Hold WORKDIR/lock, which names the process that does.

    The lock is the operating system's and ends with the process, however that ends: a file that a killed run has
    left is no obstacle. Where a file system has no such locks, the process that the file names decides.

    Raises:
      UserError: another process holds it.
      StorageError: the file cannot be written.
    """
    path = workdir / FILE_NAME
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("a+"))
            if not _acquire(file):
                holder = {"pid": "?", "host": "?", "since": "?", **_read(file)}
                raise UserError(
                    f"{workdir} is in use by process {holder['pid']} on {holder['host']} since {holder['since']}: wait"
                    f" for its end, or choose another --run.workdir (if that process has died, delete {path})"
                )
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%F %T %z")}))
            file.flush()
        except OSError as error:
            raise StorageError(f"cannot lock {path}: {reason(error)}") from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def _acquire(file: IO[str]) -> bool:
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            return _has_ended(_read(file))


def _has_ended(holder: dict[str, Any]) -> bool:
    """Tell whether no process is named, or one of this host that is gone: that of another host never is."""
    if not holder or holder.get("host") != platform.node():
        return not holder
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, TypeError):
        pass  # it is there and someone else's, or senseless
    return False


def _read(file: IO[str]) -> dict[str, Any]:
    """Return who holds it; nothing if that is not to be read."""
    file.seek(0)
    try:
        return dict(json.loads(file.read()))
    except (ValueError, TypeError):
        return {}
