"""Images in a folder for each class, such as those of ImageNet; each is read only when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from resnet_jax.data.dataset import LabelledImages
from resnet_jax.errors import UserError


class ImageFiles:
    """Image files; indexing reads one as RGB uint8 [H, W, 3]."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = tuple(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int, /) -> np.ndarray:
        """Read an image; grey and CMYK are converted.

        Raises:
          UserError: the file cannot be read.
        """
        try:
            with Image.open(self._paths[index]) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise UserError(f"cannot read the image {self._paths[index]}: {error}") from error


def load_test_folder(data_dir: str | Path) -> LabelledImages:
    """List the validation images DATA_DIR/val/CLASS/FILE; the classes are the folders, sorted by name.

    Raises:
      UserError: no such folder, or no image in it.
    """
    root = Path(data_dir) / "val"
    if not root.is_dir():
        raise UserError(f"no folder {root}: --data.dir must name the folder that holds val/CLASS/FILE")
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = [
        (label, path)
        for label, name in enumerate(classes)
        for path in sorted((root / name).iterdir())
        if path.is_file() and not path.name.startswith(".")
    ]
    if not files:
        raise UserError(f"no images in {root}: expected {root}/CLASS/FILE")
    labels, paths = zip(*files, strict=True)
    ids = tuple(path.relative_to(root).as_posix() for path in paths)
    return LabelledImages("imagenet", ImageFiles(paths), np.array(labels, np.int32), ids, tuple(classes))
