"""Small folders of made-up photographs for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_folder(folder: Path, *, classes: int = 3, images: int = 8, test_images: int = 3, side: int = 40) -> None:
    """Write FOLDER/train and FOLDER/val, so many JPEGs of each class, of different sizes around `side` pixels.

    The colour says which class it is, so that a network can learn them.
    """
    random = np.random.RandomState(0)
    for split, count in (("train", images), ("val", test_images)):
        for label in range(classes):
            (folder / split / f"class{label}").mkdir(parents=True)
            for number in range(count):
                height, width = side + random.randint(0, side, 2)
                noise = random.randint(0, 100, (height // 4, width // 4, 3)).astype(np.uint8)
                noise[..., label % 3] += 100
                image = Image.fromarray(noise).resize((int(width), int(height)), Image.Resampling.BICUBIC)
                image.save(folder / split / f"class{label}" / f"{number}.jpg", quality=95)
