"""Checksums of a folder's files, kept in the folder: damage is found before it is read as numbers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from resnet_jax.files import read_json

FILE_NAME = "checksums.json"


class Damage(NamedTuple):
    """What is wrong with a folder.

    Attributes:
      missing: files that are gone.
      changed: files with other contents.
    """

    missing: tuple[str, ...]
    changed: tuple[str, ...]

    def __str__(self) -> str:
        name, verb = (self.changed[0], "has changed") if self.changed else (self.missing[0], "is missing")
        others = len(self.changed) + len(self.missing) - 1
        return f"{name} {verb}" + (f", and {others} more files" if others else "")


def write_checksums(folder: Path, *, leave_out: Collection[str] = ()) -> None:
    """Write the SHA-256 of all files, which are on the disk then: a power cut after it loses none of them.

    Args:
      folder: it and what is below it.
      leave_out: names in `folder` itself of files that may still change.
    """
    checksums = {name: _sha256(path, sync=True) for name, path in _files(folder).items() if name not in leave_out}
    text = json.dumps(checksums, indent=0) + "\n"
    with (folder / FILE_NAME).open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: Path) -> Damage | None:
    """Compare a folder with its checksums; None if all files that they name are as they were."""
    files = _files(folder)
    if FILE_NAME not in files:
        return Damage((FILE_NAME,), ())
    try:
        checksums = read_json(files[FILE_NAME])
        if not isinstance(checksums, dict) or not checksums:
            return Damage((), (FILE_NAME,))
        missing = [name for name in checksums if name not in files]
        # Only files that are in the folder are opened, whatever the names are.
        changed = [name for name, path in files.items() if name in checksums and _sha256(path) != checksums[name]]
    except (OSError, ValueError, TypeError):
        return Damage((), (FILE_NAME,))
    return Damage(tuple(missing), tuple(changed)) if missing or changed else None


def _files(folder: Path) -> dict[str, Path]:
    """Return the regular files of a folder by their names in it; links do not count."""
    paths = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    files = sorted(path for path in paths if path.is_file() and not path.is_symlink())
    return {path.relative_to(folder).as_posix(): path for path in files}


def _sha256(path: Path, *, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
