"""The folder of a run: configuration, preprocessing, checkpoints and logs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resnet_jax.checkpoint import Checkpoints
from resnet_jax.config import Config, difference, from_json, to_json
from resnet_jax.data import LabelledImages
from resnet_jax.data.encoded import AnyDataset
from resnet_jax.data.pipeline import Preprocessing
from resnet_jax.errors import UserError
from resnet_jax.train_state import TrainState


def is_workdir(path: Path) -> bool:
    """Tell whether a run was begun there."""
    return (path / "config.json").is_file()


def check_workdir(path: Path, config: Config) -> None:
    """Check that `config` may begin or go on at `path`.

    Raises:
      UserError: the folder belongs to another configuration or is no work directory.
    """
    if is_workdir(path):
        if found := difference(load_config(path), config):
            raise UserError(f"{path} holds a run of another configuration: {found}; choose another --run.workdir")
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not a work directory of this program; choose another --run.workdir")


class Inputs(NamedTuple):
    """What the weights take and give.

    Attributes:
      image_shape: height, width, channels.
      class_names: of the outputs.
      preprocessing: mean and std.
      lighting: colour augmentation in training, [3, 3] float32; None for none. See augment.random_lighting.
    """

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    lighting: np.ndarray | None = None


def create_workdir(
    path: Path, config: Config, inputs: Inputs, state: TrainState | None = None, source: str | None = None
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
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
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
        partial.rename(path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write the work directory {path}: {error.strerror}") from error


def load_config(path: Path) -> Config:
    """Read the configuration of a work directory; no code of it is run.

    Raises:
      UserError: it is not there or damaged.
    """
    try:
        text = (path / "config.json").read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a work directory: cannot read config.json in it") from error
    return from_json(text, str(path / "config.json"))


def check_classes(inputs: Inputs, dataset: AnyDataset | LabelledImages) -> None:
    """Raise UserError if a data set has other classes than the weights."""
    numbered = tuple(map(str, range(len(dataset.class_names))))  # as imported weights have them, without names
    if inputs.class_names not in (dataset.class_names, numbered):
        if len(inputs.class_names) != len(dataset.class_names):
            raise UserError(
                f"{dataset.name} has {len(dataset.class_names)} classes, but the weights are for"
                f" {len(inputs.class_names)}; check --data.dir"
            )
        raise UserError(
            f"{dataset.name} has the classes {', '.join(dataset.class_names)}, but the weights are for"
            f" {', '.join(inputs.class_names)}; check --data.dir"
        )


def read_source(path: Path) -> str | None:
    """Return the name of the file that the weights of a work directory were imported from; None if trained here.

    Raises:
      UserError: the record of the import is damaged.
    """
    try:
        return str(json.loads((path / "import.json").read_text())["file"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path / 'import.json'}: {error}") from error


def load_inputs(path: Path) -> Inputs:
    """Read what belongs to the weights of a work directory.

    Raises:
      UserError: it is not there or damaged.
    """
    try:
        described = json.loads((path / "inputs.json").read_text())
        with np.load(path / "preprocessing.npz") as arrays:
            preprocessing = Preprocessing(arrays["mean"], arrays["std"])
            lighting = arrays.get("lighting")
        height, width, channels = described["image_shape"]
        return Inputs((height, width, channels), tuple(described["class_names"]), preprocessing, lighting)
    except Exception as error:  # np.load raises half a dozen types for a damaged file
        raise UserError(f"cannot read inputs.json and preprocessing.npz in {path}: {error}") from error
