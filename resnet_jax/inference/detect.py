"""Objects in images of any size."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from resnet_jax.config import DetectionConfig
from resnet_jax.data.annotated import AnnotatedImages, Annotation, Boxed
from resnet_jax.data.buckets import Buckets, Reader, evaluation_batches, rows_of_process
from resnet_jax.data.decode import BrokenImageError, encode_raw, open_image
from resnet_jax.data.read_ahead import Batches
from resnet_jax.detection_metrics import Detections
from resnet_jax.detection_stages import stage_of
from resnet_jax.detection_steps import FoundInImages, by_device, find_in_images
from resnet_jax.errors import UserError, reason
from resnet_jax.inference.load import Trained
from resnet_jax.models.detector import Detector
from resnet_jax.parallel.devices import make_shardings, round_up
from resnet_jax.parallel.memory import explained


@dataclasses.dataclass
class Results:
    """What is found in images, by their numbers.

    Attributes:
      found: see Detections.
      proposals: [P, 4] of each image, in pixels of it.
      unreadable: numbers of images that could not be read.
      seconds: from the second batch on, and `images` in them: without compilation.
    """

    found: dict[int, Detections] = dataclasses.field(default_factory=dict)
    proposals: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    unreadable: list[int] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    images: int = 0

    def add(self, batch: Boxed, results: FoundInImages) -> None:
        """Take in a batch, those rows of it that are of images; of all processes."""
        arrays: Any = (batch.number, batch.broken, results)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            arrays = multihost_utils.process_allgather(arrays, tiled=True)
        numbers, broken, results = jax.device_get(arrays)
        boxes, scores, classes = map(np.asarray, results.found)
        self.unreadable += [int(number) for number in broken if number >= 0]
        for row in np.flatnonzero(numbers >= 0):
            there = scores[row] > 0
            self.found[int(numbers[row])] = Detections(boxes[row][there], scores[row][there], classes[row][there])
            self.proposals[int(numbers[row])] = np.asarray(results.proposals)[row][results.ok[row]]


def make_find(trained: Trained, config: DetectionConfig, *, filled: bool = False, separate: bool = False) -> Any:
    """Return find(variables, batch) -> FoundInImages, jitted; each image is computed on the device that it lies on.

    Args:
      trained: a detector.
      config: how boxes are found.
      filled: whether all images fill their arrays.
      separate: whether the RPN still has a trunk of its own.
    """
    _, by_image = make_shardings()
    find = functools.partial(
        find_in_images,
        model=_detector(trained),
        config=config,
        preprocessing=trained.origin.inputs.preprocessing,
        filled=filled,
        separate=separate,
    )
    return jax.jit(by_device(find, by_image.mesh))


def find_objects(
    trained: Trained,
    images: AnnotatedImages,
    *,
    config: DetectionConfig | None = None,
    batch_size: int = 1,
    workers: int | None = 0,
) -> Results:
    """Find the objects in images, over all devices.

    Args:
      trained: a detector.
      images: their annotations say how large they are.
      config: how boxes are found; None: as in training.
      batch_size: images at a time, rounded up to the devices; it changes no result.
      workers: processes that read images; None: one a core; 0: threads.

    Raises:
      UserError: no detector.
      TooLittleMemoryError: a batch does not fit into the device's memory.
    """
    config = config or trained.origin.config.detection
    buckets = Buckets(config.shorter_side, config.longer_side)
    separate = stage_of(trained.origin.config, trained.origin.step).separate
    find = make_find(trained, config, filled=buckets.filled_by(images), separate=separate)
    replicated, by_image = make_shardings()
    variables = jax.device_put(trained.variables, replicated)
    size, results = round_up(batch_size), Results()
    began = None
    with (
        explained("detection", [f"a --batch-size below {batch_size}"]),
        Batches(evaluation_batches(Reader(images, buckets, 1), size, rows_of_process(size)), workers, Boxed) as batches,
    ):
        for arrays in batches:
            batch = Boxed(*(jax.make_array_from_process_local_data(by_image, array) for array in arrays))
            results.add(batch, find(variables, batch))
            if began is None:
                began, before = time.perf_counter(), len(results.found)
    results.seconds, results.images = time.perf_counter() - (began or 0.0), len(results.found) - before
    return results


def detect(
    trained: Trained,
    images: Sequence[np.ndarray | str | Path] | np.ndarray,
    *,
    threshold: float | None = None,
    batch_size: int = 1,
) -> list[Detections]:
    """Find the objects in images: resized as in evaluation, in full float32, over all devices.

    Args:
      trained: a detector, of load().
      images: RGB uint8 [H, W, 3] of any size, one array [N, H, W, 3] of them, or paths of image files.
      threshold: lowest score, in [0, 1]; None: that of the configuration (0.05).
      batch_size: images at a time; it changes no result.

    Returns:
      For each image boxes [M, 4] float32 (x1, y1, x2, y2 in its pixels, the last ones included), scores [M] float32
      in descending order, and classes [M] int32, of trained.origin.inputs.class_names.

    Raises:
      UserError: no detector, or a file that cannot be read.
      ValueError: an image of another type or shape.
    """
    given = GivenImages(images)
    for index, why in given.unreadable.items():
        raise UserError(f"cannot read the image {images[index]}: {why}")
    config = trained.origin.config.detection
    if threshold is not None:
        config = dataclasses.replace(config, threshold=threshold)
    found = find_objects(trained, given, config=config, batch_size=batch_size)
    for index in found.unreadable:
        raise UserError(f"cannot read the image {images[index]}: it is damaged")
    return [found.found[index] for index in range(len(images))]


class GivenImages:
    """Arrays and files without annotations, as annotated.AnnotatedImages.

    Attributes:
      unreadable: why not, by the number of the image.
    """

    def __init__(self, images: Sequence[np.ndarray | str | Path] | np.ndarray):
        """Look at the size of each.

        Raises:
          ValueError: an array of another type or shape.
        """
        self._images = images
        self.unreadable: dict[int, str] = {}
        self.annotations = tuple(self._annotation(index) for index in range(len(images)))

    def _annotation(self, index: int) -> Annotation:
        try:
            width, height = open_image(self.read(index)).size
        except BrokenImageError as error:
            self.unreadable[index] = str(error)
            width = height = 1
        return Annotation(height, width, np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros(0, bool))

    def __len__(self) -> int:
        return len(self._images)

    def id(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> bytes:
        image = self._images[index]
        if isinstance(image, (str, Path)):
            try:
                return Path(image).read_bytes()
            except OSError as error:
                raise BrokenImageError(reason(error)) from error
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected RGB uint8 images [H, W, 3], got {image.dtype} {image.shape}")
        return encode_raw(image)


def _detector(trained: Trained) -> Detector:
    if not isinstance(trained.model, Detector):
        raise UserError("this network classifies whole images: python -m resnet_jax predict, or predict() in Python")
    return trained.model


def to_plain(found: Detections, class_names: Iterable[str]) -> list[dict[str, Any]]:
    """Return plain values: class, score and box (x1, y1, x2, y2)."""
    names = tuple(class_names)
    return [
        {"class": names[k], "score": round(float(score), 5), "box": [round(float(x), 2) for x in box]}
        for box, score, k in zip(*found, strict=True)
    ]
