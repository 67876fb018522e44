"""Little image files that several test modules write."""

from __future__ import annotations

import dataclasses
import io
import pathlib
import zlib

import numpy as np
from PIL import Image

from resnet_jax.data.decode import BrokenImageError

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


@dataclasses.dataclass(frozen=True)
class Colours:
    """Images of one colour each, which says their number; some cannot be read: EncodedImages."""

    count: int
    broken: tuple[int, ...] = ()

    @property
    def labels(self) -> np.ndarray:
        return np.arange(self.count, dtype=np.int32) % 7

    def __len__(self) -> int:
        return self.count

    def id(self, index: int) -> str:
        return f"image{index}"

    def read(self, index: int) -> tuple[bytes, int]:
        if index in self.broken:
            raise BrokenImageError("made to fail")
        file = io.BytesIO()
        pixels = np.full((20, 24 + index % 3, 3), index, np.uint8)
        pixels[:, :12, 1] = 255  # so that the place of a crop and mirroring can be seen
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue(), int(self.labels[index])
