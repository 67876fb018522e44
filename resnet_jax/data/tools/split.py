"""Divide a folder of images without splits into images to train on and images to test on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from resnet_jax.data.sources.image_folder import list_classes
from resnet_jax.errors import UserError, reason


def split_folder(source: Path, out: Path, *, test_percent: float, seed: int = 0, copy: bool = False) -> dict[str, int]:
    """Write OUT/train/CLASS/FILE and OUT/val/CLASS/FILE from SOURCE/CLASS/FILE.

    Args:
      source: folder of a folder for each class.
      out: folder to make.
      test_percent: share of the images of each class that go to val/, in %; at least one, and not all.
      seed: of which ones.
      copy: whether files are copied; otherwise they are links to those of `source`.

    Returns:
      How many images each split has.

    Raises:
      UserError: no images there, a class with a single one, or a folder that exists or cannot be written.
    """
    if out.exists():
        raise UserError(f"{out} exists; choose another folder")
    images, class_names = list_classes(source)
    random = np.random.RandomState(seed)  # frozen for ever by NumPy
    val = np.zeros(len(images), bool)
    for label, name in enumerate(class_names):
        indices = np.flatnonzero(images.labels == label)
        if len(indices) < 2:
            raise UserError(f"the class {name} has a single image, which cannot be trained on and tested on")
        count = min(max(round(len(indices) * test_percent / 100), 1), len(indices) - 1)
        val[random.permutation(indices)[:count]] = True
    partial = out.with_name(out.name + ".new")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        for index, is_val in enumerate(val):
            name = os.fsdecode(images.names[index])
            path = partial / ("val" if is_val else "train") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            file = (source / name).resolve()
            if copy:
                shutil.copyfile(file, path)
            else:
                path.symlink_to(file)
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write {out}: {reason(error)}") from error
    return {"train": int((~val).sum()), "val": int(val.sum())}
