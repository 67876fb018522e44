"""Labelled images as their files hold them: read one by one, in any order, by any process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol

import numpy as np

from resnet_jax.data.dataset import Dataset, LabelledImages, validation_indices
from resnet_jax.data.decode import BrokenImageError, decode
from resnet_jax.errors import UserError


class EncodedImages(Protocol):
    """Images that are not decoded yet.

    Worker processes get a copy (by pickle), so it holds no open files, and little memory for each image.
    """

    @property
    def labels(self) -> np.ndarray:
        """[N] int32; a source may have to read every image for them, so training takes those of read()."""
        ...

    def __len__(self) -> int: ...

    def id(self, index: int) -> str:
        """Return what names an image to a reader, such as "n01440764/n01440764_18.JPEG"."""
        ...

    def read(self, index: int) -> tuple[bytes, int]:
        """Return a file's content, for decode.decode(), and its label.

        Raises:
          BrokenImageError: it cannot be read.
        """
        ...


@dataclasses.dataclass(frozen=True)
class StreamedDataset:
    """A classification data set of images of many sizes; `validation` is None unless it was split off `train`.

    Attributes:
      name: of the data set.
      folder: of the data set, where its statistics lie.
      train: to train on.
      test: to test on.
      class_names: of the labels.
      validation: images held out.
    """

    name: str
    folder: Path
    train: EncodedImages
    test: EncodedImages
    class_names: tuple[str, ...]
    validation: EncodedImages | None = None

    def test_images(self) -> LabelledImages:
        """Return the images to test on, decoded when they are asked for."""
        return decoded_images(self.name, self.test, self.class_names)


AnyDataset = Dataset | StreamedDataset


def decoded_images(name: str, images: EncodedImages, class_names: tuple[str, ...]) -> LabelledImages:
    """Return images to test on, decoded when they are asked for."""
    ids = tuple(images.id(index) for index in range(len(images)))
    return LabelledImages(name, DecodedImages(images), images.labels, ids, class_names)


@dataclasses.dataclass(frozen=True)
class DecodedImages:
    """Images; indexing reads one as RGB uint8 [H, W, 3]."""

    encoded: EncodedImages

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int, /) -> np.ndarray:
        """Read an image; grey and CMYK are converted.

        Raises:
          UserError: it cannot be read.
        """
        try:
            content, _ = self.encoded.read(index)
            return decode(content)
        except BrokenImageError as error:
            raise UserError(f"cannot read the image {self.encoded.id(index)}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some of the images, in the order of `indices` [N]."""

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


def split_streamed_validation(dataset: StreamedDataset, size: int, seed: int) -> StreamedDataset:
    """Hold `size` random training images out as `validation`.

    Raises:
      UserError: there are not so many.
    """
    validation, train = validation_indices(dataset.name, len(dataset.train), size, seed)
    return dataclasses.replace(
        dataset, train=Subset(dataset.train, train), validation=Subset(dataset.train, validation)
    )
