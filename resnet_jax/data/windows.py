"""Which part of a training image is cropped: random windows (Sec. 3.4, and Szegedy et al. 2015)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from resnet_jax.data.decode import Window

# window(rng, width, height) of an image of that size, in pixels
RandomWindow = Callable[[np.random.Generator, int, int], Window]


def scale_window(size: int, shorter_side: tuple[int, int]) -> RandomWindow:
    """Crop `size` pixels square from the image resized to a random shorter side (Sec. 3.4: 256 to 480).

    Args:
      size: of the crop in pixels.
      shorter_side: smallest and largest shorter side, both included, not below `size`.
    """

    def window(rng: np.random.Generator, width: int, height: int) -> Window:
        shorter = int(rng.integers(shorter_side[0], shorter_side[1] + 1))
        u, v = rng.random(2)  # shares, not pixels: the same part of the image whatever its size is
        side = min(width, height)
        columns, rows = width * shorter // side, height * shorter // side  # of the resized image
        left, top = int(u * (columns - size + 1)), int(v * (rows - size + 1))
        x, y = width / columns, height / rows
        return Window(left * x, top * y, size * x, size * y)

    return window


_AREAS = (0.08, 1.0)  # shares of the image
_RATIOS = (3 / 4, 4 / 3)  # width to height
_TRIES = 10


def area_window(rng: np.random.Generator, width: int, height: int) -> Window:
    """Take a random share of the area, 8 to 100 %, of a ratio between 3/4 and 4/3 (Szegedy et al. 2015).

    Where ten draws do not fit into the image, the largest window of an allowed ratio in its middle, as in torchvision.
    """
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*_AREAS)
        ratio = math.exp(rng.uniform(math.log(_RATIOS[0]), math.log(_RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            return Window(int(left), int(top), w, h)
    w = min(width, round(height * _RATIOS[1]))
    h = min(height, round(width / _RATIOS[0]))
    return Window((width - w) // 2, (height - h) // 2, w, h)
