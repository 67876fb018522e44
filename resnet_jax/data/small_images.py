"""Folders of small images of one size, as CIFAR, MNIST or SVHN are often had: kept on the devices as CIFAR-10 is."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from resnet_jax.data.decode import BrokenImageError, decode
from resnet_jax.data.types import AnyDataset, Dataset, EncodedImages, Split, StreamedDataset
from resnet_jax.errors import UserError
from resnet_jax.parallel.devices import cores

MOST_SIDE = 64  # pixels
_MOST_BYTES = 2**31  # of all images
_AT_ONCE = 1000


class _OtherSizeError(Exception):
    pass


def into_memory(dataset: StreamedDataset, wanted: bool | None) -> AnyDataset:
    """Read all images of a data set, if they have one size.

    Args:
      dataset: as it lies on the disk.
      wanted: whether it is to be read; None: where the images are of at most 64x64 pixels and 2 GiB in all.

    Raises:
      UserError: an image cannot be read, or they are wanted in memory and have several sizes.
    """
    if wanted is False:
        return dataset
    splits = [split for split in (dataset.train, dataset.test) if len(split)]
    first = _first(dataset.train)
    if first is None:
        return dataset
    try:
        size = sum(map(len, splits)) * first.nbytes
        if wanted is None and (max(first.shape[:2]) > MOST_SIDE or size > _MOST_BYTES):
            return dataset
        with ThreadPoolExecutor(cores()) as threads:
            train, test = (_read(split, first.shape, threads) for split in (dataset.train, dataset.test))
    except _OtherSizeError as error:
        if wanted is None:
            return dataset
        raise UserError(f"--data.in-memory True needs images of one size: {error}") from error
    return Dataset(dataset.name, train, test, dataset.class_names, untested=dataset.untested)


def _first(split: EncodedImages) -> np.ndarray | None:
    """Return one of the first images, if one of them can be read."""
    for index in range(min(len(split), 10)):
        with contextlib.suppress(BrokenImageError):
            return decode(split.read(index)[0])
    return None


def _read(split: EncodedImages, shape: tuple[int, ...], threads: ThreadPoolExecutor) -> Split:
    images = np.empty((len(split), *shape), np.uint8)

    def read(index: int) -> None:
        image = _decode(split, index)
        if image.shape != shape:
            sizes = [f"{height}x{width}" for height, width, _ in (shape, image.shape)]
            raise _OtherSizeError(f"the first is of {sizes[0]} pixels, {split.id(index)} of {sizes[1]}")
        images[index] = image

    for begin in range(0, len(split), _AT_ONCE):  # so that another size is soon found
        list(threads.map(read, range(begin, min(begin + _AT_ONCE, len(split)))))
    return Split(images, np.asarray(split.labels, np.int32))


def _decode(split: EncodedImages, index: int) -> np.ndarray:
    try:
        return decode(split.read(index)[0])
    except BrokenImageError as error:
        raise UserError(
            f"cannot read the image {split.id(index)}: {error}; delete it, or leave out what cannot be read with"
            " --data.in-memory False"
        ) from error
