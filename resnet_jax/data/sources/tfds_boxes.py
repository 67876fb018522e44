"""Images with boxes of TensorFlow Datasets, of the form of its "voc", read without TensorFlow."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.data.annotated import AnnotatedDataset, Annotation
from resnet_jax.data.decode import BrokenImageError, open_image
from resnet_jax.data.sources.tfds import one_line, open_prepared, open_source, quiet, tfds_package
from resnet_jax.errors import UserError, reason


def load_tfds_boxes(
    name: str, data_dir: str | Path, train_splits: Sequence[str], test_splits: Sequence[str]
) -> AnnotatedDataset:
    """Load splits of a TFDS set such as "tfds:voc/2007"; see tfds.load_tfds().

    Raises:
      UserError: an unknown set or split, or one without images, boxes and labels.
    """
    folder, builder = open_prepared(name, data_dir, _check_features)
    with quiet():
        class_names = _check_features(name, builder.info.features)
    for split in (*train_splits, *test_splits):
        if split not in builder.info.splits:
            raise UserError(f"{name} has no split {split}; there are: {', '.join(builder.info.splits)}")
    train, test = (TfdsBoxes(folder, tuple(splits)) for splits in (train_splits, test_splits))
    problems = tuple(
        f"{images.id(index)}: {problem}"
        for images in (train, test)
        for index, annotation in enumerate(images.annotations)
        for problem in annotation.problems
    )
    return AnnotatedDataset(name, train, test, class_names, problems)


def _check_features(name: str, features: Any) -> tuple[str, ...]:
    """Return the class names, once it is clear that there are images with boxes."""
    kinds = tfds_package().features
    found = features.get("objects") if isinstance(features, kinds.FeaturesDict) else None
    inner = getattr(found, "feature", {})
    if "image" not in features or "bbox" not in inner or not isinstance(inner["label"], kinds.ClassLabel):
        raise UserError(f'{name}: needs features "image" and "objects" with "bbox" and "label", found {features}')
    return tuple(inner["label"].names)


class TfdsBoxes:
    """The images of splits: annotated.AnnotatedImages. Each process opens the files when it first reads from them."""

    def __init__(self, folder: Path, splits: tuple[str, ...]):
        """Take a prepared set; all records are read once for their boxes."""
        self._folder, self._splits = folder, splits
        self._places = [(split, index) for split in splits for index in range(len(self._source(split)))]
        self.annotations = tuple(self._annotation(place) for place in range(len(self._places)))

    def __len__(self) -> int:
        return len(self._places)

    def id(self, index: int) -> str:
        """Return the name of the file that the image was, or split and number."""
        split, number = self._places[index]
        name = self._record(index).get("image/filename")
        return Path(name.decode(errors="replace")).stem if name else f"{split}/{number}"

    def read(self, index: int) -> bytes:
        try:
            return self._record(index)["image"]
        except Exception as error:  # of array_record, protobuf, tfds: whatever a damaged file leads to
            raise BrokenImageError(reason(error)) from error

    def _record(self, index: int) -> dict[str, Any]:
        split, number = self._places[index]
        return self._source(split)[number]

    def _annotation(self, index: int) -> Annotation:
        with one_line(f"{self._folder}: cannot read the image {index}"):
            record = self._record(index)
            width, height = open_image(record["image"]).size
            return annotation_of(record["objects"], height, width)

    @functools.cached_property
    def _sources(self) -> dict[str, Any]:
        return {split: open_source(self._folder, split) for split in self._splits}

    def _source(self, split: str) -> Any:
        return self._sources[split]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_sources"}


def annotation_of(objects: dict[str, Any], height: int, width: int) -> Annotation:
    """Return the annotation of an image; TFDS divides the numbers of the files, which count from 1, by its size.

    Args:
      objects: "bbox" [n, 4] (ymin, xmin, ymax, xmax), "label" [n], and "is_difficult" [n] where there is one.
      height, width: in pixels.
    """
    bbox = np.asarray(objects["bbox"], np.float64).reshape(-1, 4)
    boxes = np.round(bbox[:, [1, 0, 3, 2]] * [width, height, width, height], 3) - 1
    boxes = np.clip(boxes, 0, [width - 1, height - 1, width - 1, height - 1])
    there = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    difficult = np.asarray(objects.get("is_difficult", np.zeros(len(bbox))), bool)
    problems = tuple(f"object {number + 1}: its box is empty" for number in np.flatnonzero(~there))
    classes = np.asarray(objects["label"], np.int32)
    return Annotation(height, width, boxes[there].astype(np.float32), classes[there], difficult[there], problems)
