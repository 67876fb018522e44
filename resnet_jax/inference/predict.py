"""Probabilities of the classes of images of any size, batch by batch over all devices."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.data.augment import normalize
from resnet_jax.data.decode import BrokenImageError, decode, upright
from resnet_jax.data.inputs import adapt_preprocessing
from resnet_jax.data.types import Images
from resnet_jax.data.views import Protocol, ProtocolName, make_protocol, views
from resnet_jax.errors import UserError, reason
from resnet_jax.inference.load import Trained, check_classifies
from resnet_jax.models.backend import for_this_backend
from resnet_jax.models.fully_convolutional import fully_convolutional_logits
from resnet_jax.models.precision import full_float32
from resnet_jax.parallel.devices import cores, make_shardings
from resnet_jax.parallel.memory import explained

_RUN_AHEAD = 2  # batches that the host may be ahead of the device
_STEPS_OF_SIZE = 4  # an array is longer than its images by at most this part of the shorter side

Size = tuple[int, int]


class Probabilities(NamedTuple):
    """The mean softmax output over the views of each image.

    Attributes:
      values: [N, num_classes] float64; each row sums to 1, or is NaN where the image could not be read.
      unreadable: why not, by the number of the image.
    """

    values: np.ndarray
    unreadable: dict[int, str]


def predict(
    trained: Trained,
    images: Sequence[np.ndarray | str | Path] | np.ndarray,
    *,
    protocol: ProtocolName = "single",
    batch_size: int = 100,
) -> np.ndarray:
    """Classify images: decoded, resized and cropped as in evaluation, in full float32, over all devices.

    Args:
      trained: of load().
      images: RGB uint8 [H, W, 3] of any size, one array [N, H, W, 3] of them, or paths of image files.
      protocol: "single", "10crop" or "multiscale"; see views.Protocol.
      batch_size: views computed at a time; it changes no result.

    Returns:
      Probabilities [N, num_classes] float64 of the classes trained.origin.inputs.class_names; each row sums to 1.

    Raises:
      UserError: a file that cannot be read.
      ValueError: an image of another type or shape.
    """
    opened = OpenedImages(images, upright=trained.origin.config.data.upright)
    found = probabilities(trained, opened, protocol_of(trained, protocol), batch_size=batch_size)
    for index, why in found.unreadable.items():
        raise UserError(f"cannot read the image {images[index]}: {why}")
    return found.values


def protocol_of(trained: Trained, name: ProtocolName, scales: tuple[int, ...] | None = None) -> Protocol:
    """Make a protocol for the input of a network; scales: see views.make_protocol.

    Raises:
      UserError: scales that do not fit, or a network that cannot be applied so.
    """
    check_classifies(trained)
    height, width, channels = trained.origin.inputs.image_shape
    if not trained.origin.inputs.class_names:
        raise UserError("a backbone has no last layer to classify with: train.py --init-from it makes one")
    if channels != 3:
        raise UserError(f"images are read as RGB, and this network takes {channels} channels: model.apply() in Python")
    if name == "multiscale" and trained.origin.config.model.family == "vgg" and (height, width) != (224, 224):
        raise UserError(f"multi-scale testing needs a VGG of 224x224 pixels; this one takes {height}x{width}")
    try:
        return make_protocol(name, (height, width), scales)
    except ValueError as error:
        raise UserError(f"--scales: {error}") from error


@dataclasses.dataclass(frozen=True)
class OpenedImages:
    """Arrays as they are, and files as their images, read when they are asked for."""

    images: Sequence[np.ndarray | str | Path] | np.ndarray
    upright: bool = False  # whether files are turned as their cameras say

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> np.ndarray:
        """Return RGB uint8 [H, W, 3].

        Raises:
          BrokenImageError: a file that cannot be read.
          ValueError: an array of another type or shape.
        """
        image = self.images[index]
        if isinstance(image, (str, Path)):
            try:
                content = Path(image).read_bytes()
            except OSError as error:
                raise BrokenImageError(reason(error)) from error
            return decode(upright(content) if self.upright else content)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected RGB uint8 images [H, W, 3], got {image.dtype} {image.shape}")
        return image


def probabilities(trained: Trained, images: Images, protocol: Protocol, *, batch_size: int) -> Probabilities:
    """Compute the mean softmax output over the views of each image.

    Args:
      trained: the network.
      images: images[i] is RGB uint8 [H, W, 3], or raises BrokenImageError.
      protocol: the views.
      batch_size: views of the input's size computed at a time; of larger views fewer. It changes no result.

    Raises:
      TooLittleMemoryError: a batch does not fit into the device's memory.
    """
    logits = _make_logits(trained, protocol)
    unreadable: dict[int, str] = {}
    totals = np.zeros((len(images), len(trained.origin.inputs.class_names)))
    pending: deque[tuple[list[int], jax.Array]] = deque()

    def finish() -> None:
        indices, on_device = pending.popleft()
        for of_views in np.asarray(on_device, np.float64):  # as they are, and mirrored
            np.add.at(totals, indices, _softmax(of_views[: len(indices)]))

    with explained("testing", [f"a --batch-size below {batch_size}"]):
        for batch in _batches(read_views(images, protocol, unreadable), protocol, batch_size, jax.device_count()):
            pending.append((batch.indices, logits(batch)))
            while len(pending) > _RUN_AHEAD:
                finish()
        while pending:
            finish()
    totals[list(unreadable)] = np.nan
    return Probabilities(totals / totals.sum(1, keepdims=True), unreadable)  # each view has added 1


class _Batch:
    """Views of one array size, their sizes, and the number of the image that each is of."""

    def __init__(self, capacity: int, size: Size):
        self.images = np.zeros((capacity, *size, 3), np.uint8)
        self.sizes = np.tile(np.array(size, np.int32), (capacity, 1))  # what is not filled counts as full
        self.indices: list[int] = []

    def add(self, index: int, view: np.ndarray) -> None:
        row = len(self.indices)
        self.images[row, : view.shape[0], : view.shape[1]] = view
        self.sizes[row] = view.shape[:2]
        self.indices.append(index)

    @property
    def full(self) -> bool:
        return len(self.indices) == len(self.images)


def _batches(
    views_of_images: Iterable[list[np.ndarray]], protocol: Protocol, batch_size: int, devices: int
) -> Iterator[_Batch]:
    """Yield batches that hold every view exactly once."""
    open_batches: dict[Size, _Batch] = {}
    input_area = protocol.input_size[0] * protocol.input_size[1]
    for index, image_views in enumerate(views_of_images):
        for view in image_views:
            size = _array_size(view.shape[:2], protocol)
            if size not in open_batches:
                capacity = max(batch_size * input_area // (size[0] * size[1]), 1)
                open_batches[size] = _Batch(-(-capacity // devices) * devices, size)
            batch = open_batches[size]
            batch.add(index, view)
            if batch.full:
                del open_batches[size]
                yield batch
    yield from open_batches.values()


def read_views(images: Images, protocol: Protocol, unreadable: dict[int, str]) -> Iterator[list[np.ndarray]]:
    """Yield the views of each image, in order; they are read and resized in threads, a few images ahead.

    An image that cannot be read has none, and why is noted in `unreadable` by its number.
    """

    def of_image(index: int) -> list[np.ndarray]:
        try:
            return views(images[index], protocol)
        except BrokenImageError as error:
            unreadable[index] = str(error)
            return []

    with ThreadPoolExecutor(cores()) as pool:
        indices = iter(range(len(images)))
        queue = deque(pool.submit(of_image, index) for index in islice(indices, 4 * cores()))
        while queue:
            yield queue.popleft().result()
            queue.extend(pool.submit(of_image, index) for index in islice(indices, 1))


def _array_size(size: Size, protocol: Protocol) -> Size:
    """Round the longer side of a view up: one compiled program serves many sizes."""
    if not protocol.fully_convolutional:
        return size
    shorter, longer = sorted(size)
    step = max(shorter // _STEPS_OF_SIZE, 1)
    longer = shorter - (shorter - longer) // step * step
    return (shorter, longer) if size[0] <= size[1] else (longer, shorter)


def _make_logits(trained: Trained, protocol: Protocol) -> Callable[[_Batch], jax.Array]:
    """Return logits(batch) -> [1 or 2, N, num_classes] float32: of the views, and of their mirror images.

    It is compiled once for each size of the arrays.
    """
    model = for_this_backend(trained.model)
    replicated, by_image = make_shardings()
    variables = jax.device_put(trained.variables, replicated)

    @partial(jax.jit, out_shardings=replicated)
    def of_views(variables: Any, images: jax.Array, sizes: jax.Array) -> jax.Array:
        _, height, width, channels = images.shape
        preprocessing = adapt_preprocessing(trained.origin.inputs.preprocessing, (height, width, channels))
        extents = None if height == width else sizes  # only square views lie in a square array: they fill it
        outputs: list[Any] = []
        for flip in (False, True) if protocol.flipped else (False,):
            x = normalize(_mirror(images, sizes) if flip else images, *preprocessing)
            with full_float32():
                if protocol.fully_convolutional:
                    outputs.append(fully_convolutional_logits(model, variables, x, extents, protocol.input_size))
                else:
                    outputs.append(model.apply(variables, x, train=False))
        return jnp.stack(outputs)

    return lambda batch: of_views(variables, *jax.device_put((batch.images, batch.sizes), by_image))


def _mirror(images: jax.Array, sizes: jax.Array) -> jax.Array:
    """Mirror each image left to right within its size, leaving what is beyond it behind it."""
    column = jnp.arange(images.shape[2])
    mirrored = sizes[:, 1, None] - 1 - column  # [N, W]
    source = jnp.where(mirrored >= 0, mirrored, column)
    return jnp.take_along_axis(images, source[:, None, :, None], axis=2)


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)
