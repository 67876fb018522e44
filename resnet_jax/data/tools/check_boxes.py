"""Read every image and annotation of sets in the layout of VOC, to tell what is wrong before they are trained on."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.data.decode import BrokenImageError, decode
from resnet_jax.data.processes import Advance, run_tasks
from resnet_jax.data.sources.voc import SETS_FOLDER, VocImage, read_set
from resnet_jax.errors import printable

_AT_ONCE = 64  # images of a task


@dataclasses.dataclass(frozen=True)
class BoxesReport:
    """What is in sets of images with boxes.

    Attributes:
      folder: what was looked at.
      sets: images by set.
      objects: by class.
      difficult: how many of them are.
      most: objects of an image.
      empty: images without objects.
      shortest: shorter sides of the boxes: smallest, median, largest, in pixels.
      smallest, largest: images, (width, height), each side by itself.
      problems: what cannot be used, in words.
    """

    folder: str
    sets: dict[str, int]
    objects: dict[str, int]
    difficult: int
    most: int
    empty: int
    shortest: tuple[float, float, float] | None
    smallest: tuple[int, int] | None
    largest: tuple[int, int] | None
    problems: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether all of it can be used."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self) | {"sound": self.sound}

    def to_text(self) -> str:
        """Return lines to read."""
        lines = [f"{self.folder}: images with boxes, in the layout of VOC"]
        lines += [f"  {name}: {count:,} images" for name, count in self.sets.items()]
        total = sum(self.objects.values())
        lines.append(f"{total:,} objects ({self.difficult:,} difficult), at most {self.most} in an image")
        lines += [f"  {name}: {count:,}" for name, count in self.objects.items()]
        if self.smallest and self.largest:
            (low_w, low_h), (high_w, high_h) = self.smallest, self.largest
            lines.append(f"images are {low_w} to {high_w} pixels wide, {low_h} to {high_h} high")
        if self.shortest:
            low, median, high = self.shortest
            lines.append(f"shorter sides of the boxes: {low:g} to {high:g} pixels, median {median:g}")
        if self.empty:
            lines.append(f"{self.empty:,} images have no objects, and are trained to be background")
        if self.problems:
            lines.append(f"{len(self.problems):,} problems, which are left out in training:")
            lines += [f"  {problem}" for problem in self.problems]
        return "\n".join(map(printable, lines))


def find_voc_sets(data_dir: Path) -> list[str]:
    """Return the sets in a folder, such as "2007_trainval" or "trainval"; none if it has another layout."""
    found = []
    for folder in (data_dir, *sorted([*data_dir.glob("VOC[0-9]*"), *data_dir.glob("VOCdevkit/VOC[0-9]*")])):
        year = "" if folder == data_dir else f"{folder.name.removeprefix('VOC')}_"
        # Beside trainval, train, val and test VOC has lists for each class, such as dog_test.
        names = sorted(path.stem for path in (folder / SETS_FOLDER).glob("*.txt"))
        found += [year + name for name in names if "_" not in name]
    return found


def check_boxes(data_dir: Path, sets: list[str], *, workers: int = 1) -> BoxesReport:
    """Read the annotations and decode the images of sets.

    Raises:
      UserError: a set that cannot be read.
    """
    by_set = {name: read_set(data_dir, name) for name in sets}
    images = list({image.path: image for of_set in by_set.values() for image in of_set}.values())
    tasks = [images[start : start + _AT_ONCE] for start in range(0, len(images), _AT_ONCE)]
    unreadable = [line for found in run_tasks(_examine, tasks, workers=workers, images=len(images)) for line in found]
    problems = [f"{image.path.stem}: {problem}" for image in images for problem in image.problems]
    boxes = np.concatenate([image.boxes for image in images])
    sides = (boxes[:, 2:] - boxes[:, :2] + 1).min(1) if len(boxes) else np.zeros(0)
    sizes = np.array([image.size[::-1] for image in images if image.size])
    return BoxesReport(
        str(data_dir),
        {name: len(of_set) for name, of_set in by_set.items()},
        dict(sorted(Counter(name for image in images for name in image.names).items())),
        sum(sum(image.difficult) for image in images),
        max((len(image.names) for image in images), default=0),
        sum(1 for image in images if image.size and not image.names),
        (float(sides.min()), float(np.median(sides)), float(sides.max())) if len(sides) else None,
        tuple(sizes.min(0).tolist()) if len(sizes) else None,
        tuple(sizes.max(0).tolist()) if len(sizes) else None,
        tuple(sorted([*problems, *unreadable])),
    )


def _examine(images: list[VocImage], advance: Advance) -> list[str]:
    """Decode images; return what is wrong with them."""
    found = []
    for image in images:
        try:
            height, width = decode(image.path.read_bytes()).shape[:2]
            if image.size and image.size != (height, width):
                said = f"{image.size[1]}x{image.size[0]}"
                found.append(f"{image.path.stem}: it has {width}x{height} pixels, its annotation says {said}")
        except (OSError, BrokenImageError) as error:
            found.append(f"{image.path.stem}: cannot read the image: {error}")
        advance(1)
    return found
