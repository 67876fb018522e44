"""The folder of a run: configuration, preprocessing, checkpoints and logs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from resnet_jax.config import Config, difference, from_json, to_json
from resnet_jax.data.pipeline import Preprocessing
from resnet_jax.errors import UserError


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


def create_workdir(path: Path, config: Config, preprocessing: Preprocessing) -> None:
    """Make the folder, complete or not at all.

    Raises:
      UserError: it cannot be written.
    """
    partial = path.with_name(path.name + ".new")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "config.json").write_text(to_json(config))
        np.savez(partial / "preprocessing.npz", mean=preprocessing.mean, std=preprocessing.std)
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


def load_preprocessing(path: Path) -> Preprocessing:
    """Read the mean and std that belong to the weights of a work directory.

    Raises:
      UserError: they are not there or damaged.
    """
    file = path / "preprocessing.npz"
    try:
        with np.load(file) as arrays:
            return Preprocessing(arrays["mean"], arrays["std"])
    except Exception as error:  # np.load raises half a dozen types for a damaged file
        raise UserError(f"cannot read {file}: {error}") from error
