"""Little image files that several test modules write."""

from __future__ import annotations

import io
import pathlib
import zlib

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cow")


def encoded(seed: str, width: int = 20, height: int = 16, mode: str = "RGB", format: str = "JPEG") -> bytes:
    """Return an image file of smooth random colours; of `seed` alone what it shows depends."""
    random = np.random.RandomState(zlib.crc32(seed.encode()))
    pixels = Image.fromarray(random.randint(0, 256, (3, 4, 3)).astype(np.uint8)).resize((width, height))
    file = io.BytesIO()
    pixels.convert(mode).save(file, format)
    return file.getvalue()


def write(root: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    """Write files by their path below `root`; return `root`."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_folder(root: pathlib.Path, train: int = 2, val: int = 1) -> pathlib.Path:
    """Write a folder of images: so many in each class of train/ and val/."""
    names = [
        f"{split}/{name}/{i}.jpeg"
        for split, count in (("train", train), ("val", val))
        for name in CLASSES
        for i in range(count)
    ]
    return write(root, {name: encoded(name) for name in names})
