"""Small sets in the layout of VOC, written for a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

_SIDES = ("xmin", "ymin", "xmax", "ymax")
_COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


def write_set(folder: Path, sets: dict[str, list[str]]) -> Path:
    """Write ImageSets/Main/SET.txt for each set."""
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    for name, ids in sets.items():
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{id}\n" for id in ids))
    return folder


def write_image(
    folder: Path, id: str, size: tuple[int, int], objects: list[tuple[str, tuple[int, int, int, int], bool]]
):
    """Write an image of (height, width) with filled rectangles, and its annotation.

    Args:
      folder: of the set.
      id: of the image.
      size: height and width.
      objects: of each its class, its box x1, y1, x2, y2 from 1 on as the file has it, and whether it is difficult.
    """
    for name in ("Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 3), 128, np.uint8)
    elements = []
    for name, (x1, y1, x2, y2), difficult in objects:
        pixels[max(y1 - 1, 0) : y2, max(x1 - 1, 0) : x2] = _COLOURS.get(name, (250, 250, 30))
        box = "".join(f"<{side}>{v}</{side}>" for side, v in zip(_SIDES, (x1, y1, x2, y2), strict=True))
        elements.append(
            f"<object><name>{name}</name><difficult>{int(difficult)}</difficult><bndbox>{box}</bndbox></object>"
        )
    Image.fromarray(pixels).save(folder / "JPEGImages" / f"{id}.jpg", quality=95)
    height, width = size
    (folder / "Annotations" / f"{id}.xml").write_text(
        f"<annotation><size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        + "".join(elements)
        + "</annotation>"
    )


def make_set(folder: Path, images: int = 8, *, portrait: int = 3, seed: int = 0) -> Path:
    """Write a set of rectangles on grey: "trainval" and "test" are the same images, the last `portrait` are upright."""
    rng = np.random.default_rng(seed)
    ids = [f"{number:06}" for number in range(images)]
    for number, id in enumerate(ids):
        height, width = (96, 80) if number >= images - portrait else (72, 96)
        objects = []
        for k, quarter in enumerate(rng.permutation(4)[: rng.integers(1, 4)]):  # of the image: none hides another
            w, h = (rng.integers(side * 3 // 10, side // 2) for side in (width, height))
            left, top = (quarter % 2) * (width // 2), (quarter // 2) * (height // 2)
            x, y = left + rng.integers(1, width // 2 - w + 1), top + rng.integers(1, height // 2 - h + 1)
            name = list(_COLOURS)[(number + k) % 3]
            objects.append((name, (int(x), int(y), int(x + w - 1), int(y + h - 1)), False))
        write_image(folder, id, (height, width), objects)
    return write_set(folder, {"trainval": ids, "test": ids})
