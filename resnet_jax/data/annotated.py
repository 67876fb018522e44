"""What detection is trained and tested on: images with boxes, in splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class Annotation(NamedTuple):
    """What is known of an image: its size and its objects.

    Attributes:
      height, width: in pixels.
      boxes: [n, 4] float32: x1, y1, x2, y2 in pixels from 0 on, the last ones included.
      classes: [n] int32 from 0 on.
      difficult: [n] bool: not trained on, and not counted in tests.
      problems: what was left out, in words.
    """

    height: int
    width: int
    boxes: np.ndarray
    classes: np.ndarray
    difficult: np.ndarray
    problems: tuple[str, ...] = ()


class AnnotatedImages(Protocol):
    """Images as their files hold them, and their annotations; worker processes get a copy (by pickle)."""

    @property
    def annotations(self) -> Sequence[Annotation]: ...

    def __len__(self) -> int: ...

    def id(self, index: int) -> str:
        """Return what names an image: of VOC the name of its files, such as "000005"."""
        ...

    def read(self, index: int) -> bytes:
        """Return a file's content, for decode.decode().

        Raises:
          BrokenImageError: it cannot be read.
        """
        ...


@dataclasses.dataclass(frozen=True)
class AnnotatedDataset:
    """Images with boxes to train and to test on; `problems` are what was left out, in words."""

    name: str
    train: AnnotatedImages
    test: AnnotatedImages
    class_names: tuple[str, ...]
    problems: tuple[str, ...] = ()
    validation: None = None
    untested: tuple[str, ...] = ()


def most_objects(images: AnnotatedImages) -> int:
    """Return the largest number of objects that one of the images is trained on, at least 1."""
    return max([1, *(int((~annotation.difficult).sum()) for annotation in images.annotations)])


class Boxed(NamedTuple):
    """A whole batch of images with boxes on the devices, or this process's rows of it as NumPy arrays.

    Attributes:
      images: [B, H, W, 3] uint8, resized, each in the upper left corner of its array.
      sizes: [B, 2] int32, height and width of the resized images.
      original: [B, 2] int32, height and width before.
      scales: [B] float32, pixels to one of the original.
      boxes: [B, G, 4] float32, of the resized image.
      classes: [B, G] int32 from 1 on; 0 fills up.
      row: [B] int32, of the whole batch.
      number: [B] int32, of the image in its split; -1 for a row that fills up.
      broken: [B] int32: -1, or the number of the image that could not be read.
    """

    images: Any
    sizes: Any
    original: Any
    scales: Any
    boxes: Any
    classes: Any
    row: Any
    number: Any
    broken: Any
