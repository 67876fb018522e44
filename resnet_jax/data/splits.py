"""Validation images held out of the training images, and images to test on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from resnet_jax.data.decode import decode, upright
from resnet_jax.data.types import AnyDataset, Dataset, EncodedImages, LabelledImages, Split
from resnet_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some of the images, in the order of `indices` [N]: EncodedImages."""

    images: EncodedImages
    indices: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        return self.images.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def id(self, index: int) -> str:
        return self.images.id(int(self.indices[index]))

    def read(self, index: int) -> tuple[bytes, int]:
        return self.images.read(int(self.indices[index]))


@dataclasses.dataclass(frozen=True)
class Upright:
    """Images that are turned as their cameras say (EXIF), wherever they are decoded: EncodedImages."""

    images: EncodedImages

    @property
    def labels(self) -> np.ndarray:
        return self.images.labels

    def __len__(self) -> int:
        return len(self.images)

    def id(self, index: int) -> str:
        return self.images.id(index)

    def read(self, index: int) -> tuple[bytes, int]:
        content, label = self.images.read(index)
        return upright(content), label


def split_validation(dataset: AnyDataset, size: int, seed: int) -> AnyDataset:
    """Move `size` random training images into `validation`; the paper's 45k/5k split (Sec. 4.2) is size 5000.

    Raises:
      UserError: there are no more than `size`.
    """
    images = len(dataset.train)
    if not 0 < size < images:
        raise UserError(
            f"--data.validation-size {size}: choose between 1 and {images - 1} ({dataset.name} has {images} training"
            " images)"
        )
    order = np.random.RandomState(seed).permutation(images)  # RandomState: frozen for ever by NumPy
    validation, train = np.sort(order[:size]), np.sort(order[size:])
    if isinstance(dataset, Dataset):
        pixels, labels = dataset.train.images, dataset.train.labels
        parts = [Split(pixels[indices], labels[indices]) for indices in (train, validation)]
        return dataclasses.replace(dataset, train=parts[0], validation=parts[1])
    return dataclasses.replace(
        dataset, train=Subset(dataset.train, train), validation=Subset(dataset.train, validation)
    )


def classes_without(images: EncodedImages, class_names: Sequence[str]) -> tuple[str, ...]:
    """Return the classes that have no images."""
    missing = np.flatnonzero(np.bincount(images.labels, minlength=len(class_names)) == 0)
    return tuple(class_names[int(i)] for i in missing)


@dataclasses.dataclass(frozen=True)
class _DecodedImages:
    """Images; indexing reads one as RGB uint8 [H, W, 3]."""

    encoded: EncodedImages

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int, /) -> np.ndarray:
        """Read an image.

        Raises:
          BrokenImageError: it cannot be read.
        """
        return decode(self.encoded.read(index)[0])


def turned(images: LabelledImages) -> LabelledImages:
    """Return images to test on, turned upright; those in memory have no mark of a camera."""
    if not isinstance(images.images, _DecodedImages):
        return images
    return dataclasses.replace(images, images=_DecodedImages(Upright(images.images.encoded)))


def decoded_images(name: str, images: EncodedImages, class_names: tuple[str, ...]) -> LabelledImages:
    """Return images to test on, decoded when they are asked for."""
    ids = tuple(images.id(index) for index in range(len(images)))
    return LabelledImages(name, _DecodedImages(images), images.labels, ids, class_names)


def images_to_test(dataset: AnyDataset) -> LabelledImages:
    """Return the images to test on of a data set, decoded when they are asked for."""
    if isinstance(dataset, Dataset):
        ids = tuple(map(str, range(len(dataset.test))))
        return LabelledImages(dataset.name, dataset.test.images, dataset.test.labels, ids, dataset.class_names)
    return decoded_images(dataset.name, dataset.test, dataset.class_names)
