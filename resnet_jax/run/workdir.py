"""The folder of a run: configuration, preprocessing, checkpoints and logs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from pydantic import PositiveInt

from resnet_jax.config import Config, difference, from_json, to_json
from resnet_jax.data.types import Inputs, Preprocessing, check_inputs
from resnet_jax.errors import StorageError, UserError, reason
from resnet_jax.files import atomic_write, read_arrays, read_text
from resnet_jax.run.checkpoint import Checkpoints
from resnet_jax.run.lock import FILE_NAME as LOCK
from resnet_jax.run.lock import lock
from resnet_jax.run.saved import saved_steps


def is_workdir(path: Path) -> bool:
    """Tell whether a run was begun there."""
    return (path / "config.json").is_file()


def check_workdir(config: Config) -> Path:
    """Return the work directory if the configuration may begin or go on there.

    Raises:
      UserError: none is named, or the folder belongs to another configuration or is no work directory.
    """
    if not config.run.workdir:
        raise UserError("--run.workdir is not set: name a folder for checkpoints and logs")
    path = Path(config.run.workdir)
    if is_workdir(path):
        if found := difference(_with_later_boundaries(path, config), config):
            raise UserError(
                f"{path} holds a run of another configuration: {found}; choose another --run.workdir, and to begin"
                f" there with these weights add --init-from {path}"
            )
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not a work directory of this program; choose another --run.workdir")
    return path


def _with_later_boundaries(path: Path, new: Config) -> Config:
    """Return the configuration of a work directory; drops of the rate beyond its last step may be others."""
    old = load_config(path)
    step = max(saved_steps(path), default=0)
    past = [[boundary for boundary in config.optim.boundaries if boundary <= step] for config in (old, new)]
    if past[0] != past[1]:
        return old
    return dataclasses.replace(old, optim=dataclasses.replace(old.optim, boundaries=new.optim.boundaries))


def keep_boundaries(path: Path, config: Config) -> None:
    """Write what check_workdir() has allowed to be another into config.json, which the next call compares with.

    Raises:
      UserError: it cannot be written.
    """
    changed = _with_later_boundaries(path, config)
    if changed != load_config(path):
        with atomic_write(path / "config.json") as partial:
            partial.write_text(to_json(changed))


def create_workdir(
    path: Path, config: Config, inputs: Inputs, state: Any | None = None, source: str | None = None
) -> None:
    """Make the folder, complete or not at all.

    Args:
      path, config, inputs: of the run, or of the import.
      state: the first checkpoint.
      source: file that the weights of `state` were imported from.

    Raises:
      UserError: it cannot be written.
    """
    partial = path.with_name(path.name + ".new")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with lock(partial):
            _fill(partial, config, inputs, state, source)
            partial.rename(path)
    except (OSError, StorageError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, StorageError):
            raise
        raise UserError(f"cannot write the work directory {path}: {reason(error)}") from error


def _fill(partial: Path, config: Config, inputs: Inputs, state: Any | None, source: str | None) -> None:
    for left in partial.iterdir():  # by a process that was killed
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name != LOCK:
            left.unlink()
    (partial / "config.json").write_text(to_json(config))
    arrays = {**inputs.preprocessing._asdict(), "lighting": inputs.lighting}
    np.savez(partial / "preprocessing.npz", **{name: a for name, a in arrays.items() if a is not None})
    described = {"image_shape": inputs.image_shape, "class_names": inputs.class_names}
    (partial / "inputs.json").write_text(json.dumps(described, indent=2) + "\n")
    if source is not None:
        (partial / "import.json").write_text(json.dumps({"file": source}) + "\n")
    if state is not None:
        checkpoints = Checkpoints(partial)
        checkpoints.save(state)
        checkpoints.close()


def load_config(path: Path) -> Config:
    """Read the configuration of a work directory; no code of it is run.

    Raises:
      UserError: it is not there or damaged.
    """
    try:
        text = read_text(path / "config.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a work directory: cannot read config.json in it") from error
    return from_json(text, str(path / "config.json"))


class _Import(pydantic.BaseModel):
    """import.json."""

    file: str


def read_source(path: Path) -> str | None:
    """Return the name of the file that the weights of a work directory were imported from; None if trained here.

    Raises:
      UserError: the record of the import is damaged.
    """
    try:
        return _Import.model_validate_json(read_text(path / "import.json"), strict=True).file
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path / 'import.json'}: {reason(error)}") from error


class _Described(pydantic.BaseModel):
    """inputs.json."""

    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    class_names: tuple[str, ...]


def load_inputs(path: Path) -> Inputs:
    """Read what belongs to the weights of a work directory.

    Raises:
      UserError: it is not there or damaged.
    """
    try:
        described = _Described.model_validate_json(read_text(path / "inputs.json"), strict=True)
        arrays = read_arrays(path / "preprocessing.npz")
        preprocessing = Preprocessing(arrays["mean"], arrays["std"])
        inputs = Inputs(described.image_shape, described.class_names, preprocessing, arrays.get("lighting"))
        check_inputs(inputs)
        return inputs
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read inputs.json and preprocessing.npz in {path}: {reason(error)}") from error
