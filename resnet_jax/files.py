"""Files that are complete or not there at all, and records that outlive a crash."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resnet_jax.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield another path to write to, which then becomes `path`: a reader never sees half a file.

    Raises:
      UserError: it cannot be written; what was at `path` is still there.
    """
    partial = path.with_name(path.name + ".new")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file, one a line, in order; lines cut short by a crash are left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records
