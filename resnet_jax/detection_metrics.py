"""What detection is measured by: the four losses in training, average precision and recall in tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np

from resnet_jax.data.annotated import AnnotatedImages
from resnet_jax.detection.voc_metric import Curve, average_precision, overlaps, precision_recall
from resnet_jax.metrics import AnyArray

LOSSES = ("rpn_class_loss", "rpn_box_loss", "region_class_loss", "region_box_loss")
_RECALLS = np.linspace(0.5, 0.95, 10)  # IoUs whose recalls are averaged


@flax.struct.dataclass
class DetectionMetrics:
    """Sums over images in training: float32 scalars.

    Attributes:
      losses: summed over images, by the names of LOSSES.
      positives: anchors that were trained to be objects.
      foreground: regions that were trained to be objects.
      regions: regions that were trained.
      wrong: of these, those whose class had not the largest logit.
      images: how many.
    """

    losses: dict[str, AnyArray]
    positives: AnyArray
    foreground: AnyArray
    regions: AnyArray
    wrong: AnyArray
    count: AnyArray

    def __add__(self, other: DetectionMetrics) -> DetectionMetrics:
        return jax.tree.map(lambda a, b: a + b, self, other)

    @property
    def images(self) -> int:
        return int(self.count)

    @property
    def loss(self) -> Any:
        """The sum of the four losses, over all images."""
        return sum(self.losses.values())

    @property
    def mean_loss(self) -> float:
        """The sum of the four losses, of an image on average."""
        return float(self.loss) / self.images

    @property
    def batch_error(self) -> Any:
        """Wrongly classified regions, in %."""
        return 100 * self.wrong / (self.regions + (self.regions == 0))

    def values(self, num_classes: int) -> dict[str, Any]:
        """Return what a record of the training holds."""
        del num_classes
        of_image = {name: float(value) / self.images for name, value in self.losses.items()}
        counts = {name: float(getattr(self, name)) / self.images for name in ("positives", "foreground", "regions")}
        return {"loss": self.mean_loss, "error": float(self.batch_error), **of_image, **counts, "images": self.images}

    def words(self, num_classes: int) -> str:
        """Return what a line of the log says."""
        values = self.values(num_classes)
        losses = "  ".join(f"{name.removesuffix('_loss').replace('_', ' ')} {values[name]:.3f}" for name in LOSSES)
        return (
            f"loss {values['loss']:.3f}  ({losses})  {values['positives']:.0f} anchors"
            f"  {values['foreground']:.0f} of {values['regions']:.0f} regions"
        )


class Detections(NamedTuple):
    """What is found in an image, the best first.

    Attributes:
      boxes: [M, 4] float32: x1, y1, x2, y2 in pixels from 0 on, the last ones included.
      scores: [M] float32, probabilities.
      classes: [M] int32 from 0 on.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


@dataclasses.dataclass(frozen=True)
class DetectionScore:
    """How well the objects of images are found.

    Attributes:
      class_names: of the objects.
      average_precisions: [K] in %, at an IoU above 0.5; NaN for a class without objects.
      curves: of each class.
      recall: objects that a proposal overlaps by 0.5 or more, in %.
      average_recall: the mean of that over IoUs from 0.5 to 0.95, in %.
      images: tested.
    """

    class_names: tuple[str, ...]
    average_precisions: np.ndarray
    curves: tuple[Curve, ...]
    recall: float
    average_recall: float
    images: int

    @property
    def mean_average_precision(self) -> float:
        """The mean over the classes that have objects, in %."""
        known = self.average_precisions[~np.isnan(self.average_precisions)]
        return float(known.mean()) if len(known) else float("nan")

    @property
    def error(self) -> float:
        """What is lacking to 100 %: the checkpoint with the least is the best."""
        return 100 - self.mean_average_precision

    @property
    def finite(self) -> bool:
        return True

    def values(self, num_classes: int) -> dict[str, Any]:
        """Return what a record of an evaluation holds: in %, None where there are no objects."""
        del num_classes
        of_classes = zip(self.class_names, map(_plain, self.average_precisions), strict=True)
        return {
            "mean_average_precision": _plain(self.mean_average_precision),
            "average_precision": dict(of_classes),
            "recall": _plain(self.recall),
            "average_recall": _plain(self.average_recall),
            "images": self.images,
        }

    def result(self, num_classes: int) -> str:
        """Return what a line of the log says."""
        del num_classes
        return f"AP@.5 {self.mean_average_precision:.2f} %  proposals' recall {self.recall:.2f} %"


def _plain(value: float) -> float | None:
    """Return a number, or None for what there is not."""
    return None if np.isnan(value) else float(value)


def score(
    images: AnnotatedImages,
    class_names: Sequence[str],
    found: dict[int, Detections],
    proposals: dict[int, np.ndarray],
    *,
    eleven_point: bool,
) -> DetectionScore:
    """Compare what was found in images with their objects.

    Args:
      images: with annotations.
      class_names: of the objects.
      found: by the number of the image; images without are left out.
      proposals: [P, 4] of each of these images, in pixels of it.
      eleven_point: see voc_metric.average_precision().
    """
    numbers = sorted(found)
    annotations = [images.annotations[number] for number in numbers]
    of_image = np.concatenate([np.full(len(found[n].scores), i) for i, n in enumerate(numbers)] or [np.zeros(0, int)])
    boxes, scores, classes = (
        np.concatenate([getattr(found[n], name) for n in numbers]) for name in ("boxes", "scores", "classes")
    )
    curves = []
    for k in range(len(class_names)):
        of_class = [a.classes == k for a in annotations]
        mine = classes == k
        curves.append(
            precision_recall(
                of_image[mine],
                scores[mine],
                boxes[mine],
                [a.boxes[o] for a, o in zip(annotations, of_class, strict=True)],
                [a.difficult[o] for a, o in zip(annotations, of_class, strict=True)],
            )
        )
    best = [_covered(a.boxes[~a.difficult], proposals[n]) for a, n in zip(annotations, numbers, strict=True)]
    covered = np.concatenate(best) if best else np.zeros(0)
    recalls = [100 * float((covered >= iou).mean()) if len(covered) else float("nan") for iou in _RECALLS]
    return DetectionScore(
        tuple(class_names),
        np.array([100 * average_precision(curve, eleven_point=eleven_point) for curve in curves]),
        tuple(curves),
        recalls[0],
        float(np.mean(recalls)),
        len(numbers),
    )


def _covered(boxes: np.ndarray, proposals: np.ndarray) -> np.ndarray:
    """Return the IoU [n] of each object with a proposal of its own: the best pair first, as py-faster-rcnn does."""
    covered = np.zeros(len(boxes))
    if not len(proposals) or not len(boxes):
        return covered
    shares = np.stack([overlaps(box, proposals) for box in boxes])
    for _ in range(min(shares.shape)):
        i, j = np.unravel_index(shares.argmax(), shares.shape)
        if shares[i, j] < 0:
            break
        covered[i] = shares[i, j]
        shares[i], shares[:, j] = -1, -1
    return covered
