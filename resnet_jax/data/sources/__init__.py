"""Data sets by name, in memory or read image by image in training: a source is one file and one line of SOURCES."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from resnet_jax.data.sources.cifar10 import load_cifar10
from resnet_jax.data.sources.cifar100 import load_cifar100
from resnet_jax.data.sources.digits import load_digits
from resnet_jax.data.sources.image_folder import load_image_folder, load_test_folder
from resnet_jax.data.sources.packed import is_packed, load_packed, load_packed_test
from resnet_jax.data.sources.tfds import load_tfds
from resnet_jax.data.splits import Upright, images_to_test, turned
from resnet_jax.data.types import AnyDataset, LabelledImages, StreamedDataset
from resnet_jax.errors import UserError, did_you_mean


def _load_folder(name: str, data_dir: str | Path) -> AnyDataset:
    return load_packed(name, data_dir) if is_packed(data_dir) else load_image_folder(name, data_dir)


# By what a name begins with, up to a colon: load(name, data_dir).
SOURCES: dict[str, Callable[[str, str | Path], AnyDataset]] = {
    "digits": lambda name, data_dir: load_digits(),
    "cifar10": lambda name, data_dir: load_cifar10(data_dir),
    "cifar100": load_cifar100,
    "cifar100-coarse": load_cifar100,
    "imagenet": _load_folder,
    "folder": _load_folder,
    "tfds:": load_tfds,
}


def load_dataset(name: str, data_dir: str | Path, *, upright: bool = False) -> AnyDataset:
    """Load the data set `name` from below `data_dir`.

    Args:
      name: "digits" (needs no files), "cifar10", "cifar100", "cifar100-coarse", "imagenet" or "folder" (images in
        train/CLASS and val/CLASS, as they are or packed), or "tfds:NAME" such as "tfds:mnist:3.0.1".
      data_dir: where files are looked for, and put if they have to be downloaded.
      upright: whether images that are read in training are turned as their cameras say.

    Raises:
      UserError: an unknown name, or whatever its source finds wrong.
    """
    source = "tfds:" if name.startswith("tfds:") else name
    if source not in SOURCES:
        known = ", ".join(SOURCES).replace("tfds:", "tfds:NAME")
        raise UserError(f"unknown data set {name!r}: choose one of {known}{did_you_mean(name, SOURCES)}")
    dataset = SOURCES[source](name, data_dir)
    if upright and isinstance(dataset, StreamedDataset):
        return dataclasses.replace(dataset, train=Upright(dataset.train), test=Upright(dataset.test))
    return dataset


def load_test_images(name: str, data_dir: str | Path, *, upright: bool = False) -> LabelledImages:
    """Load the images that the data set `name` is tested on.

    Args:
      name: as for load_dataset; "imagenet" and "folder" need no images to train on.
      data_dir: where files are looked for.
      upright: as for load_dataset.

    Raises:
      UserError: an unknown name, or whatever its source finds wrong.
    """
    if SOURCES.get(name) is _load_folder:
        images = load_packed_test(name, data_dir) if is_packed(data_dir) else load_test_folder(name, data_dir)
    else:
        images = images_to_test(load_dataset(name, data_dir))
    return turned(images) if upright else images
