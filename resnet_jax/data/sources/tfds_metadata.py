"""What a prepared TFDS set says of itself, checked before TFDS reads it: the folder may come from others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from resnet_jax.data.inside import check_inside, read_file
from resnet_jax.data.sources.tfds_records import AGAIN
from resnet_jax.errors import UserError

_OWN = "tensorflow_datasets."
_NAMES_A_CLASS = ("pythonClassName", "python_class_name", "type", "proto_cls")  # the last two in files of before 2022


def check_folder(folder: Path, data_dir: Path) -> None:
    """Check that files are files, that links stay inside `data_dir`, and that features.json names classes of TFDS.

    TFDS imports the module of a class that it does not know.

    Raises:
      UserError: one of these is not so.
    """
    check_inside(folder, data_dir)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        check_inside(entry.path, data_dir)
        if not (entry.is_file() or entry.is_dir()):
            raise UserError(f"{entry.path}: not a regular file; delete it")
    path = folder / "features.json"
    try:
        foreign = _foreign_class(json.loads(read_file(path)))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}: not a prepared TFDS set (features.json: {error}); {AGAIN}") from error
    if foreign is not None:
        raise UserError(f"{path}: refused the class {foreign[:100]}: it is not of TensorFlow Datasets")


def check_shards(builder: Any) -> None:
    """Check that the files of all splits lie in the folder of the set, and not where dataset_info.json leads to.

    Raises:
      UserError: one does not.
    """
    folder = Path(builder.data_dir)
    for split in builder.info.splits.values():
        for instruction in split.file_instructions:
            if Path(instruction.filename).parent != folder:
                raise UserError(f"{folder}: dataset_info.json leads to {instruction.filename}, outside of that folder")


def _foreign_class(value: Any) -> str | None:
    """Return a class that is not of TFDS, or None; features of features can be JSON inside a string."""
    if isinstance(value, dict):
        for key in _NAMES_A_CLASS:
            name = value.get(key)
            if isinstance(name, str) and "." in name and not name.startswith(_OWN):
                return name
        value = list(value.values())
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            value = json.loads(value)
        except ValueError:
            return None
        return _foreign_class(value)
    if isinstance(value, list):
        return next((found for item in value if (found := _foreign_class(item)) is not None), None)
    return None
