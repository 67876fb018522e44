"""Images of all sizes in arrays of two shapes, landscape and portrait, and the order that they come in.

Everything is a pure function of the step and a seed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import grain
import jax
import numpy as np

from resnet_jax.data.annotated import AnnotatedImages, Boxed
from resnet_jax.data.decode import BrokenImageError, decode
from resnet_jax.errors import UserError

_TRIES = 100  # images in a row that may be broken
_ENDLESS = 2**40  # steps


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes of arrays: shorter_side x longer_side, lying or upright."""

    shorter_side: int
    longer_side: int

    def scale(self, height: int, width: int) -> float:
        """Return by how much an image is resized: its shorter side, or else its longer one, becomes the array's."""
        scale = self.shorter_side / min(height, width)
        return self.longer_side / max(height, width) if round(scale * max(height, width)) > self.longer_side else scale

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of a resized image."""
        scale = self.scale(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def upright(self, height: int, width: int) -> bool:
        """Tell whether an image is for the upright array."""
        return height > width

    def shape(self, *, upright: bool) -> tuple[int, int]:
        """Return height and width of an array."""
        return (self.longer_side, self.shorter_side) if upright else (self.shorter_side, self.longer_side)

    def filled_by(self, images: AnnotatedImages) -> bool:
        """Tell whether each image fills its array."""
        return all(
            self.size(a.height, a.width) == self.shape(upright=self.upright(a.height, a.width))
            for a in images.annotations
        )


def resize(pixels: np.ndarray, scale: float, size: tuple[int, int]) -> np.ndarray:
    """Resize uint8 [H, W, 3] to [*size, 3] by bilinear interpolation without antialiasing, as OpenCV does."""

    def of_axis(x: np.ndarray, axis: int) -> np.ndarray:
        at = np.clip((np.arange(size[axis]) + 0.5) / scale - 0.5, 0, x.shape[axis] - 1)
        low = at.astype(np.intp)
        high = np.minimum(low + 1, x.shape[axis] - 1)
        share = (at - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (-1, 1))
        first = x.take(low, axis).astype(np.float32)
        return first + share * (x.take(high, axis) - first)

    if size == pixels.shape[:2] and scale == 1:
        return pixels
    return np.rint(of_axis(of_axis(pixels, 0), 1)).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Reader:
    """What reads the rows of a batch.

    Attributes:
      images: to read.
      buckets: shapes of the arrays.
      most: objects of an image at most.
    """

    images: AnnotatedImages
    buckets: Buckets
    most: int

    def groups(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of the lying images and of the upright ones."""
        upright = np.array([self.buckets.upright(a.height, a.width) for a in self.images.annotations], bool)
        return np.flatnonzero(~upright), np.flatnonzero(upright)

    def row(self, index: int, row: int, *, mirrored: bool) -> Boxed:
        """Read an image into a row of a batch.

        Raises:
          BrokenImageError: it cannot be read, or its size is not that of its annotation.
        """
        annotation = self.images.annotations[index]
        height, width = annotation.height, annotation.width
        pixels = decode(self.images.read(index))
        if pixels.shape[:2] != (height, width):
            found = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise BrokenImageError(f"it has {found} pixels, its annotation says {width}x{height}")
        boxes = annotation.boxes
        if mirrored:
            pixels = pixels[:, ::-1]
            boxes = np.stack([width - boxes[:, 2] - 1, boxes[:, 1], width - boxes[:, 0] - 1, boxes[:, 3]], 1)
        scale, size = self.buckets.scale(height, width), self.buckets.size(height, width)
        array = np.zeros((*self.buckets.shape(upright=self.buckets.upright(height, width)), 3), np.uint8)
        array[: size[0], : size[1]] = resize(pixels, scale, size)
        kept = np.flatnonzero(~annotation.difficult)[: self.most]
        placed = np.zeros((self.most, 4), np.float32)
        placed[: len(kept)] = boxes[kept] * np.float32(scale)
        classes = np.zeros(self.most, np.int32)
        classes[: len(kept)] = annotation.classes[kept] + 1
        return self._row(array, size, (height, width), scale, placed, classes, row, index, -1)

    def nothing(self, row: int, broken: int, *, upright: bool) -> Boxed:
        """Return a row that fills up."""
        shape = self.buckets.shape(upright=upright)
        boxes, classes = np.zeros((self.most, 4), np.float32), np.zeros(self.most, np.int32)
        return self._row(np.zeros((*shape, 3), np.uint8), shape, shape, 1.0, boxes, classes, row, -1, broken)

    def _row(
        self, image: np.ndarray, size: Any, original: Any, scale: float, boxes: Any, classes: Any, *rest: int
    ) -> Boxed:
        numbers = [np.int32(number) for number in rest]
        return Boxed(image, np.int32(size), np.int32(original), np.float32(scale), boxes, classes, *numbers)


def stacked(rows: Sequence[Boxed]) -> tuple[np.ndarray, ...]:
    """Make a batch of rows."""
    return tuple(np.stack(arrays) for arrays in zip(*rows, strict=True))


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """The batch of each step: all its images are lying, or all are upright.

    The two groups take turns in proportion to their images. Each is an endless stream of permutations of every image,
    as it is and mirrored, cut into batches: nothing is dropped.

    Attributes:
      reader: of the rows.
      batch_size: over all processes.
      rows: those of this process.
      flip: whether images also come mirrored.
      seed: of the order.
    """

    reader: Reader
    batch_size: int
    rows: range
    flip: bool
    seed: int

    def stream(self, step: int) -> grain.MapDataset:
        """Return the batches of step + 1, step + 2, ..."""
        return grain.MapDataset.range(_ENDLESS).map(_At(self, self.reader.groups()))[step:]

    def upright(self, step: int) -> bool:
        """Tell whether the batch of the step after `step` is of upright images."""
        lying, upright = map(len, self.reader.groups())
        return bool((step + 1) * upright // (lying + upright) > step * upright // (lying + upright))


@dataclasses.dataclass
class _At:
    batches: TrainBatches
    groups: tuple[np.ndarray, np.ndarray]
    orders: Any = None

    def __call__(self, step: int) -> tuple[np.ndarray, ...]:
        """Read this process's rows of the batch of the step after `step`."""
        one = self.batches
        if self.orders is None:  # in each process, once
            times = 2 if one.flip else 1
            self.orders = [
                grain.MapDataset.range(times * len(group)).shuffle(seed=one.seed).repeat() if len(group) else None
                for group in self.groups
            ]
        lying, upright = map(len, self.groups)
        before = step * upright // (lying + upright)  # upright batches
        is_upright = (step + 1) * upright // (lying + upright) > before
        batch = before if is_upright else step - before
        group, order = self.groups[is_upright], self.orders[is_upright]
        places = [order[batch * one.batch_size + row] for row in one.rows]
        return stacked([self._row(group, place, row) for place, row in zip(places, one.rows, strict=True)])

    def _row(self, group: np.ndarray, place: int, row: int) -> Boxed:
        mirrored, place = place >= len(group), place % len(group)
        broken = -1
        for _ in range(_TRIES):
            index = int(group[place])
            try:
                return self.batches.reader.row(index, row, mirrored=mirrored)._replace(broken=np.int32(broken))
            except BrokenImageError:
                broken = index if broken < 0 else broken
                place = (place + 1) % len(group)
        raise UserError(
            f"{_TRIES} training images in a row cannot be read, from {self.batches.reader.images.id(broken)} on"
        )


def rows_of_process(batch_size: int) -> range:
    """Return which rows of a batch this process reads."""
    each = batch_size // jax.process_count()
    return range(jax.process_index() * each, (jax.process_index() + 1) * each)


def evaluation_batches(reader: Reader, batch_size: int, rows: range) -> grain.MapDataset:
    """Return batches that hold every image once, lying ones first; rows of the index -1 fill up.

    Args:
      reader: of the rows.
      batch_size: over all processes.
      rows: those of this process.
    """
    return grain.MapDataset.source(_TestBatches(reader, batch_size, rows))


@dataclasses.dataclass(frozen=True)
class _TestBatches:
    reader: Reader
    batch_size: int
    rows: range

    @functools.cached_property
    def _indices(self) -> list[tuple[bool, np.ndarray]]:
        found = []
        for upright, group in enumerate(self.reader.groups()):
            whole = np.full(-(-len(group) // self.batch_size) * self.batch_size, -1)
            whole[: len(group)] = group
            found += [(bool(upright), of_batch) for of_batch in whole.reshape(-1, self.batch_size)]
        return found

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, number: int) -> tuple[np.ndarray, ...]:
        upright, indices = self._indices[number]
        return stacked([self._row(int(indices[row]), row, upright=upright) for row in self.rows])

    def _row(self, index: int, row: int, *, upright: bool) -> Boxed:
        if index < 0:
            return self.reader.nothing(row, -1, upright=upright)
        try:
            return self.reader.row(index, row, mirrored=False)
        except BrokenImageError:
            return self.reader.nothing(row, index, upright=upright)
