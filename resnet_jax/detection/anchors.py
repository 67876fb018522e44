"""Anchors: the boxes at each position of a feature map that the RPN begins with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def base_anchors(ratios: Sequence[float], scales: Sequence[float], base: int = 16) -> np.ndarray:
    """Return the anchors of the first position [A, 4] float32; ratios (height to width) change slowest.

    py-faster-rcnn rounds the sides of a base x base square of each ratio, halves to even, before it is scaled.
    """
    anchors = []
    for ratio in ratios:
        width = np.round(np.sqrt(base * base / ratio))
        height = np.round(width * ratio)
        for scale in scales:
            half = (np.array([width, height]) * scale - 1) / 2
            center = (base - 1) / 2
            anchors.append(np.concatenate([center - half, center + half]))
    return np.array(anchors, np.float32)


def grid_anchors(height: int, width: int, stride: int, base: np.ndarray) -> np.ndarray:
    """Return the anchors of a feature map [height * width * A, 4]: row by row, those of a position together."""
    y, x = np.meshgrid(np.arange(height) * stride, np.arange(width) * stride, indexing="ij")
    shifts = np.stack([x, y, x, y], -1).reshape(-1, 1, 4).astype(np.float32)
    return (shifts + base).reshape(-1, 4)
