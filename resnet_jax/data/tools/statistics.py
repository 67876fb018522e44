"""Mean image and principal colours of a data set, computed once and stored beside it."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resnet_jax.data.decode import BrokenImageError, decode
from resnet_jax.data.processes import Advance, run_tasks
from resnet_jax.data.splits import Subset
from resnet_jax.data.types import EncodedImages, StreamedDataset
from resnet_jax.data.views import Protocol, make_protocol, views
from resnet_jax.errors import UserError, reason
from resnet_jax.files import atomic_write, read_arrays
from resnet_jax.parallel.hosts import is_first

FILE_NAME = "statistics.npz"
_AT_ONCE = 32  # images of a task
_SMALL = 50_000  # images that are read for their statistics when a run begins: some minutes at most


class Statistics(NamedTuple):
    """Of the training images, each resized and cropped in its centre as in testing; in units of [0, 1].

    Attributes:
      mean: the mean image [H, W, 3] float32 (Sec. 3.4: "with the per-pixel mean subtracted").
      eigenvalues: of the covariance of the colours of all pixels, [3] float32, descending (Krizhevsky et al. 2012).
      eigenvectors: [3, 3] float32, one in each column.
      images: training images that there were.
      broken: those of them that could not be read and are left out.
    """

    mean: np.ndarray
    eigenvalues: np.ndarray
    eigenvectors: np.ndarray
    images: int
    broken: int

    @property
    def lighting(self) -> np.ndarray:
        """[3, 3]: times three standard normal numbers, the colour augmentation of strength 1."""
        return self.eigenvectors * self.eigenvalues


def compute_statistics(images: EncodedImages, image_size: int, *, workers: int = 1) -> Statistics:
    """Read all training images once; the mean image is of image_size pixels in height and width.

    Raises:
      UserError: no image can be read.
    """
    protocol = make_protocol("single", (image_size, image_size))
    starts = range(0, len(images), _AT_ONCE)
    pixels, products, readable = np.zeros((image_size, image_size, 3), np.int64), np.zeros((3, 3), np.int64), 0
    for part in run_tasks(_Sums(images, protocol), starts, workers=workers, images=len(images)):
        pixels += part[0]
        products += part[1]
        readable += part[2]
    if not readable:
        raise UserError(f"none of the {len(images)} training images can be read")
    count = readable * image_size**2
    colour = pixels.sum((0, 1)) / count
    covariance = (products / count - np.outer(colour, colour)) / 255**2
    values, vectors = np.linalg.eigh(covariance)  # ascending
    return Statistics(
        mean=(pixels / (255 * readable)).astype(np.float32),
        eigenvalues=values[::-1].astype(np.float32),
        eigenvectors=vectors[:, ::-1].astype(np.float32),
        images=len(images),
        broken=len(images) - readable,
    )


@dataclasses.dataclass(frozen=True)
class _Sums:
    images: EncodedImages
    protocol: Protocol

    def __call__(self, start: int, advance: Advance) -> tuple[np.ndarray, np.ndarray, int]:
        """Return exact sums over the images from `start` on, so that their order does not matter.

        They are of the pixels [H, W, 3], of the products of the colours of each [3, 3], and how many images there are.
        """
        pixels = np.zeros((*self.protocol.input_size, 3), np.int64)
        products, count = np.zeros((3, 3), np.int64), 0
        for index in range(start, min(start + _AT_ONCE, len(self.images))):
            with contextlib.suppress(BrokenImageError):
                (image,) = views(decode(self.images.read(index)[0]), self.protocol)
                pixels += image
                colours = image.reshape(-1, 3).astype(np.float64)
                products += (colours.T @ colours).astype(np.int64)  # whole numbers below 2^53: exact
                count += 1
            advance(1)
        return pixels, products, count


def save_statistics(statistics: Statistics, folder: Path) -> Path:
    """Write statistics beside a data set; return the file.

    Raises:
      UserError: it cannot be written.
    """
    path = folder / FILE_NAME
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.savez(file, **statistics._asdict())
    return path


def find_statistics(dataset: StreamedDataset, data_dir: str | Path, image_size: int, *, workers: int) -> Statistics:
    """Read the statistics beside a data set; of a small one without them they are computed and put there.

    Raises:
      UserError: see load_statistics() and compute_statistics().
    """
    images = _all_training_images(dataset)
    if len(images) > _SMALL or (dataset.folder / FILE_NAME).exists():
        return load_statistics(dataset, data_dir)
    statistics = compute_statistics(images, image_size, workers=workers)
    if is_first():  # of several processes, which would write one file
        with contextlib.suppress(UserError):  # of a folder that may only be read
            save_statistics(statistics, dataset.folder)
    return statistics


def _all_training_images(dataset: StreamedDataset) -> EncodedImages:
    """Return the images to train on and those held out of them."""
    return dataset.train.images if isinstance(dataset.train, Subset) else dataset.train


def load_statistics(dataset: StreamedDataset, data_dir: str | Path) -> Statistics:
    """Read the statistics beside a data set; errors name `data_dir`.

    Raises:
      UserError: there are none, they are damaged, or of another number of images.
    """
    path = dataset.folder / FILE_NAME
    images = len(_all_training_images(dataset))
    name = "" if dataset.name in ("imagenet", "folder") else f" --name {dataset.name}"
    again = f"python -m resnet_jax data statistics {data_dir}{name}"
    try:
        loaded: dict[str, Any] = read_arrays(path)
        statistics = Statistics(**loaded)._replace(images=int(loaded["images"]), broken=int(loaded["broken"]))
        shapes = statistics.mean.shape[2:], statistics.eigenvalues.shape, statistics.eigenvectors.shape
        if shapes != ((3,), (3,), (3, 3)) or any(array.dtype != np.float32 for array in statistics[:3]):
            raise ValueError("its arrays are not those of statistics")
    except FileNotFoundError as error:
        raise UserError(f"no {path}, which mean and colours come from: {again}") from error
    except (OSError, ValueError, TypeError) as error:  # TypeError: other arrays than these
        raise UserError(f"cannot read {path} ({reason(error)}); compute it again: {again}") from error
    if statistics.images != images:
        raise UserError(f"{path} is of {statistics.images} training images, but there are {images}: {again}")
    return statistics
