"""Normalization and augmentation.

What needs decoded images of one size is pure JAX, for use inside a jitted step: normalize, random_crop, random_flip,
random_lighting. What decides which part of a file is decoded at all is computed on the host: scale_window, area_window.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.data.decode import Window


def normalize(images: jax.Array, mean: jax.typing.ArrayLike, std: jax.typing.ArrayLike) -> jax.Array:
    """Scale uint8 images [N, H, W, C] to [0, 1], subtract `mean` and divide by `std` (both [H, W, C] or [C])."""
    return (images.astype(jnp.float32) / 255 - mean) / std


def random_crop(key: jax.Array, images: jax.Array, *, padding: int) -> jax.Array:
    """Pad each side by `padding` zeros and cut out a random window of the old size (Sec. 4.2).

    Args:
      key: random key; each image [H, W, C] of `images` [N, H, W, C] gets its own offset.
      images: normalized, so that zero is the mean.
      padding: in pixels.
    """
    count, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    offsets = jax.random.randint(key, (count, 2), 0, 2 * padding + 1)

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, channels))

    return jax.vmap(crop)(padded, offsets)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirror each image of [N, H, W, C] left to right with probability 1/2."""
    flip = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def random_lighting(key: jax.Array, images: jax.Array, lighting: jax.typing.ArrayLike) -> jax.Array:
    """Shift the colour of each image at random along the principal colours (Krizhevsky et al. 2012; Sec. 3.4).

    Args:
      key: random key; each image gets three numbers from a standard normal distribution.
      images: [N, H, W, 3].
      lighting: [3, 3]: what these numbers are multiplied by, in the units of the images: the eigenvectors of the
        covariance of colours, in columns, times their eigenvalues, times the strength of 0.1.
    """
    shifts = jnp.einsum("nk,ck->nc", jax.random.normal(key, (len(images), 3)), jnp.asarray(lighting))
    return images + shifts[:, None, None, :]


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
