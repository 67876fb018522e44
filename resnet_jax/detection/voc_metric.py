"""Average precision as the PASCAL VOC development kit computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Curve(NamedTuple):
    """Precision over recall of a class, one entry a detection, the best first.

    Attributes:
      recall, precision: float64 in [0, 1].
      objects: how many there are, difficult ones not counted.
    """

    recall: np.ndarray
    precision: np.ndarray
    objects: int


def overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the IoU [N] of a box [4] and boxes [N, 4], whose last pixels belong to them; in float64."""
    box, boxes = box.astype(np.float64), boxes.astype(np.float64)
    sides = np.maximum(np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2]) + 1, 0)
    both = sides.prod(1)
    areas = [(b[..., 2:] - b[..., :2] + 1).prod(-1) for b in (box, boxes)]
    return both / (areas[0] + areas[1] - both)


def precision_recall(
    images: np.ndarray,
    scores: np.ndarray,
    boxes: np.ndarray,
    objects: Sequence[np.ndarray],
    difficult: Sequence[np.ndarray],
    threshold: float = 0.5,
) -> Curve:
    """Match the detections of a class with its objects, the best first.

    A detection is right if the object that it overlaps most was not found before and the IoU is above the threshold; if
    that object is difficult, it counts neither way.

    Args:
      images: [D], the number of the image of each detection.
      scores: [D].
      boxes: [D, 4].
      objects: of each image the boxes [n, 4] of its objects of this class.
      difficult: of each image [n] bool.
      threshold: IoU.
    """
    order = np.argsort(-scores, kind="stable")
    found = [np.zeros(len(of_image), bool) for of_image in objects]
    right, wrong = np.zeros(len(order)), np.zeros(len(order))
    for rank, detection in enumerate(order):
        image = images[detection]
        shares = overlaps(boxes[detection], objects[image]) if len(objects[image]) else np.zeros(1)
        best = int(shares.argmax())
        if not shares[best] > threshold:
            wrong[rank] = 1
        elif not difficult[image][best]:
            (wrong if found[image][best] else right)[rank] = 1
            found[image][best] = True
    number = int(sum(np.sum(~np.asarray(of_image, bool)) for of_image in difficult))
    true, false = right.cumsum(), wrong.cumsum()
    recall = true / number if number else np.full(len(true), np.nan)
    return Curve(recall, true / np.maximum(true + false, np.finfo(np.float64).eps), number)


def average_precision(curve: Curve, *, eleven_point: bool) -> float:
    """Return the average precision in [0, 1]; NaN without objects.

    Args:
      curve: of precision_recall().
      eleven_point: the mean of the highest precision from each recall 0, 0.1, ... 1 on (VOC 2007); else the area under
        the curve whose precision does not rise (2010 on).
    """
    if not curve.objects:
        return float("nan")
    if eleven_point:
        # As in the published code: the fourth is 0.30000000000000004, which a recall of 0.3 does not reach.
        reached = [curve.precision[curve.recall >= t] for t in np.arange(0, 1.1, 0.1)]
        return float(np.mean([of_recall.max() if len(of_recall) else 0.0 for of_recall in reached]))
    recall = np.concatenate([[0.0], curve.recall, [1.0]])
    precision = np.concatenate([[0.0], curve.precision, [0.0]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * precision[1:]))
