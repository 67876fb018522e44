"""What a network gets wrong: errors and confusions by class, and the images themselves."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from resnet_jax.evaluate import Evaluation

MOST_ROWS = 20  # classes in a table, and confusions in a list
_MISTAKES = 24
_LARGEST_SIDE = 160  # of an embedded picture, in pixels
_PIXEL_ART_SIDE = 64  # up to here a picture is shown with its pixels as squares


def count_confusions(evaluation: Evaluation) -> np.ndarray:
    """Count images by (true class, predicted class)."""
    num_classes = len(evaluation.test.class_names)
    counts = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts, (evaluation.test.labels, evaluation.probabilities.argmax(1)), 1)
    return counts


def errors_by_class(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return name, images, error in % (or None) and length of the bar in %: all classes, or the worst ones."""
    errors = np.asarray(evaluation.class_errors)
    order = np.arange(len(errors))
    if len(errors) > MOST_ROWS:
        order = np.argsort(-np.nan_to_num(errors, nan=-1.0), kind="stable")[:MOST_ROWS]
    counts = np.bincount(evaluation.test.labels, minlength=len(errors))
    largest = max([1e-9, *errors[~np.isnan(errors)]])
    return [
        {
            "name": evaluation.test.class_names[i],
            "images": int(counts[i]),
            "error": None if np.isnan(errors[i]) else float(errors[i]),
            "bar": 0.0 if np.isnan(errors[i]) else round(100 * float(errors[i]) / largest, 1),
        }
        for i in order
    ]


def confusion_matrix(confusions: np.ndarray, class_names: tuple[str, ...]) -> list[tuple[str, list[tuple[int, float]]]]:
    """Return (true class, [(images, opacity)] by predicted class); the root makes rare confusions visible."""
    shares = confusions / np.maximum(confusions.sum(1, keepdims=True), 1)
    opacities = np.round(0.8 * np.sqrt(shares), 3).tolist()
    cells = [list(zip(*row, strict=True)) for row in zip(confusions.tolist(), opacities, strict=True)]
    return list(zip(class_names, cells, strict=True))


def most_frequent_confusions(confusions: np.ndarray, class_names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the most frequent confusions, with their share of the true class in %."""
    off_diagonal = confusions * ~np.eye(len(confusions), dtype=bool)
    order = np.argsort(-off_diagonal, axis=None, kind="stable")[:MOST_ROWS]
    pairs = [divmod(int(i), len(confusions)) for i in order]
    return [
        {
            "true": class_names[true],
            "predicted": class_names[predicted],
            "images": int(confusions[true, predicted]),
            "share": 100 * float(confusions[true, predicted] / confusions[true].sum()),
        }
        for true, predicted in pairs
        if off_diagonal[true, predicted]
    ]


def worst_mistakes(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the wrongly classified images whose wrong class has the highest probability."""
    test, probabilities = evaluation.test, evaluation.probabilities
    predicted = probabilities.argmax(1)
    wrong = np.flatnonzero(predicted != test.labels)
    worst = wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")][:_MISTAKES]
    return [
        {
            "id": test.ids[i],
            "picture": _picture(test.images[i]),
            "true": test.class_names[test.labels[i]],
            "true_probability": 100 * float(probabilities[i, test.labels[i]]),
            "predicted": test.class_names[predicted[i]],
            "predicted_probability": 100 * float(probabilities[i, predicted[i]]),
        }
        for i in worst.tolist()
    ]


def _picture(pixels: np.ndarray) -> dict[str, Any]:
    """Return the PNG of RGB uint8 [H, W, 3] as a data URI; a large one is made smaller."""
    image = Image.fromarray(np.asarray(pixels))
    image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)  # leaves small ones alone
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"uri": uri, "width": image.width, "height": image.height, "pixels": max(image.size) <= _PIXEL_ART_SIDE}
