"""Files that are complete or not there at all, and records that outlive a crash or a full disk."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.errors import UserError, reason

_MOST_BYTES = 1 << 26  # the manifest of packed images, the largest, has some hundred bytes for each that is left out


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield another path to write to, which then becomes `path`: a reader never sees half a file.

    Raises:
      UserError: it cannot be written; what was at `path` is still there.
    """
    partial = path.with_name(path.name + ".new")
    try:
        partial.unlink(missing_ok=True)  # what a killed run has left, or a link to a file of somebody else
        yield partial
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def append_line(file: io.FileIO, line: str) -> None:
    """Append a line to an unbuffered file, whole or not at all.

    Raises:
      OSError: it cannot be written.
    """
    end = file.seek(0, os.SEEK_END)
    rest = (line + "\n").encode()
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(end)
        raise


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file, one a line, in order; none if there is no such file.

    Lines that a crash has cut short or filled with zeros, and whatever else is no JSON object, are left out.

    Raises:
      UserError: the file cannot be read.
    """
    records = []
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise UserError(f"cannot read {path}: not a regular file")
        with path.open("rb") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    record = parse_json(line)
                    records += [record] if isinstance(record, dict) else []
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return records


def read_json(path: Path) -> Any:
    """Read a JSON document.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no JSON, or too large for a file of this program.
    """
    return parse_json(read_text(path))


def read_text(path: Path) -> str:
    """Read a file of text.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not UTF-8, or too large for a file of this program.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES:,} bytes")
    return content.decode()


def parse_json(text: str | bytes) -> Any:
    """Read JSON as json.loads() does, but with a single type of error.

    Raises:
      ValueError: no JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode())
    except RecursionError as error:
        raise ValueError("values in values in values, too deeply") from error


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read arrays by name that np.savez() wrote.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is damaged, or holds objects, which would be unpickled.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except OSError:
        raise
    except Exception as error:  # NumPy and zipfile raise half a dozen types for a damaged file
        raise ValueError(f"damaged, or no .npz file ({reason(error)})") from error
