"""Files of a data folder: links are followed only inside it, and nothing but regular files is read.

A folder of others could otherwise pass any file of this computer off as an image, or make a reader wait for ever.
"""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from resnet_jax.errors import UserError, printable


def check_inside(path: str | Path, root: Path) -> None:
    """Check that a file or folder lies in a data folder in truth, too.

    Args:
      path: below `root` by its name, or `root` itself; it need not be there.
      root: the data folder, as the user has named it; it may be a link.

    Raises:
      UserError: links lead out of the folder.
    """
    target, top = os.path.realpath(path), os.path.realpath(root)
    if target != top and not target.startswith(top.rstrip(os.sep) + os.sep):
        raise UserError(
            printable(
                f"{path} leads to {target}, outside of {root}, and links of a data folder are followed only inside it:"
                " put a copy or hard links there instead, or choose a folder that holds both"
            )
        )


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file for reading, without waiting for the other end of a pipe.

    Raises:
      OSError: it cannot be opened, or is a pipe, a socket, a device or a folder.
    """
    return open(path, "rb", opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(None, "not a regular file")
    return descriptor


def read_file(path: str | Path) -> bytes:
    """Read a regular file.

    Raises:
      OSError: it cannot be read, or is a pipe, a socket, a device or a folder.
    """
    with open_regular(path) as file:
        return file.read()
