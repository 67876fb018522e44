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

from resnet_jax.errors import StorageError, UserError

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
            _acquire(file, workdir)
            _write(file, {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%F %T %z")})
        except OSError as error:
            raise StorageError(f"cannot lock {path}: {error.strerror}") from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                _write(file, None)


def _acquire(file: IO[str], workdir: Path) -> None:
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                if time.monotonic() > until:
                    raise _in_use(workdir, _read(file)) from error
            elif error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                holder = _read(file)
                if holder and not _has_ended(holder):
                    raise _in_use(workdir, holder) from error
                return
            else:
                raise
        time.sleep(0.1)


def _in_use(workdir: Path, holder: dict[str, Any]) -> UserError:
    names = "process {pid} on {host} since {since}".format_map({"pid": "?", "host": "?", "since": "?", **holder})
    return UserError(
        f"{workdir} is in use by {names}: wait for its end, or choose another --run.workdir (if that process has died,"
        f" delete {workdir / FILE_NAME})"
    )


def _has_ended(holder: dict[str, Any]) -> bool:
    """Tell whether the process is known to be gone: that of another host never is."""
    if holder.get("host") != platform.node() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # it is there, and someone else's
    return False


def _read(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    with contextlib.suppress(ValueError):
        holder = json.loads(file.read())
        if isinstance(holder, dict):
            return holder
    return {}


def _write(file: IO[str], holder: dict[str, Any] | None) -> None:
    file.truncate(0)
    if holder is not None:
        file.write(json.dumps(holder) + "\n")
    file.flush()
