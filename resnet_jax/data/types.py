"""What data sets consist of and what networks take: labelled images in splits, batches, preprocessing."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
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
    """A classification data set in memory; `validation` is None unless it was split off `train`.

    `untested` are classes without images to test on.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    validation: Split | None = None
    untested: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return self.train.images.shape[1:]


class EncodedImages(Protocol):
    """Images as their files hold them, read one by one, in any order, by any process.

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

    Its statistics lie in `folder`. `untested` are classes without images to test on, where that is known.
    """

    name: str
    folder: Path
    train: EncodedImages
    test: EncodedImages
    class_names: tuple[str, ...]
    validation: EncodedImages | None = None
    untested: tuple[str, ...] = ()


AnyDataset = Dataset | StreamedDataset


class TrainingData(abc.ABC):
    """A data set that a network is trained and tested on, batch by batch, as arrays on the devices.

    Attributes:
      splits: by name: "train", "test", and "validation" if there is one.
      held_out: the names of those that are not trained on.
      train_images: how many.
      most_steps: the most steps in one dispatch to the devices.
      streamed: whether images are read while it trains.
    """

    most_steps = 1
    streamed = False

    def __init__(self, dataset: Any):
        """Take what has train, test and validation."""
        splits = {"train": dataset.train, "test": dataset.test, "validation": dataset.validation}
        self.splits: dict[str, Any] = {name: split for name, split in splits.items() if split is not None}
        self.held_out = tuple(name for name in self.splits if name != "train")
        self.train_images = len(dataset.train)

    @abc.abstractmethod
    def begin(self, step: int) -> Any:
        """Go to the images of the step after `step`; return the shapes of what train_arrays() returns."""

    @abc.abstractmethod
    def train_arrays(self, count: int) -> Any:
        """Return what the jitted training program takes beside the state, for the next `count` steps."""

    @abc.abstractmethod
    def eval_arrays(self, split: str) -> Generator[Any, None, None]:
        """Yield what to_eval_batch() takes: every image of a held-out split once, single view."""

    @abc.abstractmethod
    def to_eval_batch(self, arrays: Any) -> Batch:
        """Make a batch inside a jitted function."""

    def unreadable(self) -> list[str]:
        """Return the images that could not be read since the last call, such as "training image n01440764/1.JPEG"."""
        return []

    def close(self) -> None:  # noqa: B027 (most have nothing to end)
        """End what reads images."""


class Images(Protocol):
    """A sequence of images, in memory or not: images[i] is RGB uint8 [H, W, 3], or raises BrokenImageError."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Images to test on, of any size."""

    name: str
    images: Images
    labels: np.ndarray  # [N] int32
    ids: tuple[str, ...]  # what names each image to a reader: its number or its file
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def without(self, left_out: Collection[int]) -> LabelledImages:
        """Return all but some images."""
        kept = [index for index in range(len(self)) if index not in left_out]
        some = _Some(self.images, kept)
        return dataclasses.replace(self, images=some, labels=self.labels[kept], ids=tuple(self.ids[i] for i in kept))


@dataclasses.dataclass(frozen=True)
class _Some:
    images: Images
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> np.ndarray:
        return self.images[self.indices[index]]


class Batch(NamedTuple):
    """Images [N, H, W, C] float32 and labels [N] int32; `mask` [N] is False for padding that must not count."""

    images: jax.Array
    labels: jax.Array
    mask: jax.Array


class HostBatch(NamedTuple):
    """A whole batch on the devices, or this process's rows of it as NumPy arrays.

    `broken` is -1, or the number of the image that could not be read; in training another one stands in its place.
    `mask` is False for what must not count: broken images, and the rows that fill up the last batch.
    """

    images: jax.Array  # [N, H, W, 3] uint8
    labels: jax.Array  # [N] int32
    broken: jax.Array  # [N] int32
    mask: jax.Array  # [N] bool


class Preprocessing(NamedTuple):
    """What normalize() needs, in units of [0, 1]: mean [H, W, C] or [C], std [C]. It belongs to the weights."""

    mean: np.ndarray
    std: np.ndarray


class Inputs(NamedTuple):
    """What the weights take and give; `lighting` is for augment.random_lighting() in training."""

    image_shape: tuple[int, int, int]  # height, width, channels: 3 (RGB) but for imported weights
    class_names: tuple[str, ...]  # none for an imported backbone
    preprocessing: Preprocessing
    lighting: np.ndarray | None = None  # [3, 3] float32


def check_inputs(inputs: Inputs) -> None:
    """Check the arrays that images are normalized with.

    Raises:
      UserError: one has another type or shape, is not finite, or a standard deviation is not above 0.
    """
    shape, _, (mean, std), lighting = inputs
    channels = shape[2:]
    for name, array, shapes in (
        ("mean", mean, [channels, shape]),
        ("std", std, [channels]),
        ("lighting", lighting, [(3, 3)]),
    ):
        if array is None:
            continue
        if array.dtype != np.float32 or array.shape not in shapes:
            raise UserError(f"the {name} of the images is {array.dtype} {array.shape}")
        if not np.isfinite(array).all():
            raise UserError(f"the {name} of the images is not finite")
    if not np.all(std > 0):
        raise UserError(f"the std of the images must be above 0; it is {std.tolist()}")
