"""Data sets by name; all return the `Dataset` of `resnet_jax.data.dataset`."""

from __future__ import annotations

import difflib
from pathlib import Path

from resnet_jax.data.cifar10 import load_cifar10
from resnet_jax.data.dataset import Dataset, LabelledImages, Split, split_validation
from resnet_jax.data.digits import load_digits
from resnet_jax.data.image_folder import load_test_folder
from resnet_jax.data.tfds_source import load_tfds
from resnet_jax.errors import UserError

__all__ = ["Dataset", "LabelledImages", "Split", "load_dataset", "load_test_images", "split_validation"]


def load_dataset(name: str, data_dir: str | Path) -> Dataset:
    """Load the data set `name` from below `data_dir`.

    Args:
      name: "digits" (needs no files), "cifar10", or "tfds:NAME" such as "tfds:mnist:3.0.1".
      data_dir: where files are looked for, and put if they have to be downloaded.

    Raises:
      UserError: an unknown name, or whatever its source finds wrong.
    """
    if name == "digits":
        return load_digits()
    if name == "cifar10":
        return load_cifar10(data_dir)
    if name.startswith("tfds:"):
        return load_tfds(name.removeprefix("tfds:"), data_dir)
    if name == "imagenet":  # what imported ImageNet weights were trained on
        raise UserError("ImageNet cannot be trained on yet; such weights can be fine-tuned on another data set")
    nearest = difflib.get_close_matches(name, ("digits", "cifar10", "tfds:"), n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise UserError(f"unknown data set {name!r}: choose digits, cifar10 or tfds:NAME{hint}")


def load_test_images(name: str, data_dir: str | Path) -> LabelledImages:
    """Load the images that the data set `name` is tested on.

    Args:
      name: as for load_dataset, or "imagenet": the images in DATA_DIR/val/CLASS.
      data_dir: where files are looked for.

    Raises:
      UserError: an unknown name, or whatever its source finds wrong.
    """
    return load_test_folder(data_dir) if name == "imagenet" else LabelledImages.of(load_dataset(name, data_dir))
