"""Data sets by name: in memory, or read image by image in training."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sized
from pathlib import Path

from resnet_jax.data.cifar10 import load_cifar10
from resnet_jax.data.dataset import Dataset, LabelledImages, Split, split_validation
from resnet_jax.data.digits import load_digits
from resnet_jax.data.encoded import AnyDataset, StreamedDataset
from resnet_jax.data.image_folder import load_image_folder, load_test_folder
from resnet_jax.data.packed import is_packed, load_packed, load_packed_test
from resnet_jax.data.tfds_source import load_tfds
from resnet_jax.errors import UserError

__all__ = [
    "AnyDataset",
    "Dataset",
    "LabelledImages",
    "Split",
    "StreamedDataset",
    "load_dataset",
    "load_test_images",
    "split_validation",
]

_FOLDERS = ("imagenet", "folder")  # of images, as they are or packed


def load_dataset(name: str, data_dir: str | Path) -> AnyDataset:
    """Load the data set `name` from below `data_dir`.

    Args:
      name: "digits" (needs no files), "cifar10", "imagenet" or "folder" (images in train/CLASS and val/CLASS, as they
        are or packed), or "tfds:NAME" such as "tfds:mnist:3.0.1".
      data_dir: where files are looked for, and put if they have to be downloaded.

    Raises:
      UserError: an unknown name, an empty split, no classes, or whatever its source finds wrong.
    """
    dataset = _load(name, data_dir)
    parts = {"training images": dataset.train, "test images": dataset.test, "classes": dataset.class_names}
    _check_not_empty(name, data_dir, parts)
    return dataset


def _load(name: str, data_dir: str | Path) -> AnyDataset:
    if name == "digits":
        return load_digits()
    if name == "cifar10":
        return load_cifar10(data_dir)
    if name in _FOLDERS:
        return load_packed(name, data_dir) if is_packed(data_dir) else load_image_folder(name, data_dir)
    if name.startswith("tfds:"):
        return load_tfds(name.removeprefix("tfds:"), data_dir)
    nearest = difflib.get_close_matches(name, ("digits", "cifar10", *_FOLDERS, "tfds:"), n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise UserError(f"unknown data set {name!r}: choose digits, cifar10, imagenet, folder or tfds:NAME{hint}")


def load_test_images(name: str, data_dir: str | Path) -> LabelledImages:
    """Load the images that the data set `name` is tested on.

    Args:
      name: as for load_dataset; "imagenet" and "folder" need no images to train on.
      data_dir: where files are looked for.

    Raises:
      UserError: an unknown name, no images, no classes, or whatever its source finds wrong.
    """
    if name in _FOLDERS:
        test = load_packed_test(name, data_dir) if is_packed(data_dir) else load_test_folder(name, data_dir)
    else:
        dataset = load_dataset(name, data_dir)
        test = LabelledImages.of(dataset) if isinstance(dataset, Dataset) else dataset.test_images()
    _check_not_empty(name, data_dir, {"test images": test, "classes": test.class_names})
    return test


def _check_not_empty(name: str, data_dir: str | Path, parts: Mapping[str, Sized]) -> None:
    """Raise UserError for what is empty: a mean over nothing would be NaN."""
    for kind, part in parts.items():
        if not len(part):
            raise UserError(f"{name} in {data_dir} has no {kind}")
