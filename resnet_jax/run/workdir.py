"""The folder of a run: configuration, preprocessing, checkpoints and logs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.config import Config, difference, from_json, to_json
from resnet_jax.data.types import Inputs, Preprocessing, check_inputs
from resnet_jax.errors import StorageError, UserError
from resnet_jax.files import read_arrays, read_json, read_text
from resnet_jax.run.checkpoint import Checkpoints
from resnet_jax.run.lock import FILE_NAME as LOCK
from resnet_jax.run.lock import lock


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
        if found := difference(load_config(path), config):
            raise UserError(f"{path} holds a run of another configuration: {found}; choose another --run.workdir")
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not a work directory of this program; choose another --run.workdir")
    return path


def create_workdir(
    path: Path, config: Config, inputs: Inputs, state: Any | None = None, source: str | None = None
) -> None:
    """Make the folder, complete or not at all.

    Args:
      path: where.
      config: of the run.
      inputs: what the weights take and give.
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
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write the work directory {path}: {error.strerror}") from error
    except StorageError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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


def read_source(path: Path) -> str | None:
    """Return the name of the file that the weights of a work directory were imported from; None if trained here.

    Raises:
      UserError: the record of the import is damaged.
    """
    try:
        source = read_json(path / "import.json")["file"]
        if not isinstance(source, str):
            raise ValueError("the name of the file is no text")
        return source
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path / 'import.json'}: {str(error)[:300]}") from error


def load_inputs(path: Path) -> Inputs:
    """Read what belongs to the weights of a work directory.

    Raises:
      UserError: it is not there or damaged.
    """
    try:
        described = read_json(path / "inputs.json")
        arrays = read_arrays(path / "preprocessing.npz")
        preprocessing = Preprocessing(arrays["mean"], arrays["std"])
        shape, names = described["image_shape"], described["class_names"]
        if not (isinstance(shape, list) and isinstance(names, list)):  # a text would be taken for its letters
            raise ValueError("image_shape and class_names are no lists")
        inputs = Inputs(tuple(shape), tuple(names), preprocessing, arrays.get("lighting"))
        _check_types(inputs)
        check_inputs(inputs)
        return inputs
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read inputs.json and preprocessing.npz in {path}: {str(error)[:300]}") from error


def _check_types(inputs: Inputs) -> None:
    """Raise ValueError for what a file may hold but create_workdir() never writes."""
    shape, names, (mean, std), lighting = inputs
    if len(shape) != 3 or not all(type(length) is int and 0 < length < 2**15 for length in shape) or shape[2] != 3:
        raise ValueError("the image_shape is not height, width and 3")
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError("the class_names are no names")
    expected: dict[str, tuple[Any, list[Any]]] = {
        "mean": (mean, [(3,), shape]),
        "std": (std, [(3,)]),
        "lighting": (lighting, [(3, 3)]),
    }
    for name, (array, shapes) in expected.items():
        if array is not None and (array.dtype != np.float32 or array.shape not in shapes):
            raise ValueError(f"the {name} is {array.dtype} {array.shape}")
