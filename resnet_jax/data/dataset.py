"""What sources return: labelled uint8 images, in splits for training, or one by one for testing."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from resnet_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Split:
    """Images [N, H, W, C] uint8 and their labels [N] int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A classification data set; `validation` is None unless it was split off `train`."""

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    validation: Split | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return self.train.images.shape[1:]


class Images(Protocol):
    """A sequence of images, in memory or not: images[i] is RGB uint8 [H, W, 3]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Images to test on, of any size.

    Attributes:
      name: of the data set.
      images: as many as there are labels.
      labels: [N] int32.
      ids: what names each image to a reader: its number or its file.
      class_names: of the labels.
    """

    name: str
    images: Images
    labels: np.ndarray
    ids: tuple[str, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @staticmethod
    def of(dataset: Dataset) -> LabelledImages:
        """Take the test split of a data set in memory."""
        ids = tuple(map(str, range(len(dataset.test))))
        return LabelledImages(dataset.name, dataset.test.images, dataset.test.labels, ids, dataset.class_names)


def make_split(images: np.ndarray, labels: np.ndarray, num_classes: int, source: str) -> Split:
    """Check images [N, H, W, C] and labels [N] of `source` (named in errors) and return them as a Split.

    Raises:
      UserError: not uint8 images of one size, no images at all, labels that are no whole numbers, counts that differ,
        or a label out of range.
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(f"{source}: expected uint8 images [N, H, W, C], found {images.dtype} {images.shape}")
    if len(images) != len(labels) or not len(images):
        raise UserError(f"{source}: {len(images)} images and {len(labels)} labels; expected one label an image")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":  # NaN would pass the next check, and [N, 1] broadcast later
        raise UserError(f"{source}: expected labels [N] that are whole numbers, found {labels.dtype} {labels.shape}")
    # Out of range, a one-hot label would silently be all zeros, and an index be clipped.
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        raise UserError(
            f"{source}: label {labels[outside[0]]} of image {outside[0]} is outside 0..{num_classes - 1}"
            f" ({len(outside)} such labels): the file is damaged or not of this data set"
        )
    return Split(images, labels.astype(np.int32))


def split_validation(dataset: Dataset, size: int, seed: int) -> Dataset:
    """Move `size` random training images into `validation`; the paper's 45k/5k split (Sec. 4.2) is size 5000.

    Raises:
      UserError: there are not so many.
    """

    def take(indices: np.ndarray) -> Split:
        return Split(dataset.train.images[indices], dataset.train.labels[indices])

    validation, train = validation_indices(dataset.name, len(dataset.train), size, seed)
    return dataclasses.replace(dataset, train=take(train), validation=take(validation))


def validation_indices(name: str, images: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw `size` of the training images of the data set `name` to hold out; return these and the others, ascending.

    Raises:
      UserError: there are not so many.
    """
    if not 0 < size < images:
        raise UserError(
            f"--data.validation-size {size}: choose between 1 and {images - 1} ({name} has {images} training images)"
        )
    order = np.random.RandomState(seed).permutation(images)  # RandomState: frozen for ever by NumPy
    return np.sort(order[:size]), np.sort(order[size:])
