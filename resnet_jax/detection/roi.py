"""RoI max pooling of Fast R-CNN (Girshick 2015): the maximum of each bin of a region, as Caffe rounds the bins.

A bin is at most some cells wide, and is covered by four windows of a power of two, which may overlap. So the maxima of
all such windows are made once for a map, and each bin is the maximum of four of them: no loop over sizes of bins.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def roi_pool(feature_map: jax.Array, rois: jax.Array, scale: float, size: int) -> jax.Array:
    """Pool regions of a feature map.

    The gradient of a bin goes to its maximum (of equal ones, to one of them), none to the regions.

    Args:
      feature_map: [H, W, C].
      rois: [R, 4] float32, in pixels of the image.
      scale: cells of the map to a pixel: 1/16.
      size: bins to a side.

    Returns:
      [R, size, size, C]; 0 in bins that hold no cell of the map.
    """
    bins = _bins(feature_map.shape, jax.lax.stop_gradient(rois), scale, size)
    levels = _levels(feature_map.shape, size)
    return _pool(feature_map, bins, levels)


def bin_edges(longest: int, size: int) -> np.ndarray:
    """Return first and last + 1 cell of each bin of a region of n cells, by n: [longest + 1, 2, size] int32.

    Computed as Caffe does, in float32: i * (n / size) there is sometimes below or above the whole number that it would
    be exactly, as of 57 and 62 cells. A table, because other processors may divide otherwise.
    """
    length = np.arange(longest + 1, dtype=np.float32)[:, None] / np.float32(size)
    i = np.arange(size, dtype=np.float32)
    return np.stack([np.floor(i * length), np.ceil((i + 1) * length)], 1).astype(np.int32)


def _levels(shape: tuple[int, ...], size: int) -> tuple[int, int]:
    """Return how many powers of two, from 1 on, the bins of a map (H, W, C) need along each axis."""
    edges = (bin_edges(length + 1, size) for length in shape[:2])
    most_rows, most_columns = (int((edge[:, 1] - edge[:, 0]).max()) for edge in edges)
    return most_rows.bit_length(), most_columns.bit_length()


def _round(x: jax.Array) -> jax.Array:
    """Round halves up, as C's round() does above 0."""
    floor = jnp.floor(x)
    return jnp.where(x - floor >= 0.5, floor + 1, floor).astype(jnp.int32)


def _bins(shape: tuple[int, ...], rois: jax.Array, scale: float, size: int) -> jax.Array:
    """Return [R, 2, 2, size] int32: of rows and columns, the first and last + 1 cell of each bin, inside the map."""

    def of_axis(axis: int) -> jax.Array:
        length = shape[axis]
        first, last = (_round(rois[:, 1 - axis + end] * scale) for end in (0, 2))
        span = jnp.clip(last - first + 1, 1, length + 1)  # of a region inside the image it is no longer
        edges = jnp.asarray(bin_edges(length + 1, size))[span] + first[:, None, None]  # [R, 2, size]
        return jnp.clip(edges, 0, length)

    return jnp.stack([of_axis(0), of_axis(1)], 1)


def _windows(feature_map: jax.Array, levels: tuple[int, int]) -> list[list[jax.Array]]:
    """Return the maxima [H, W, C] of windows of 2^j x 2^k cells that begin at each cell, and end at the border."""
    rows = [feature_map]
    for j in range(1, levels[0]):
        rows.append(_of_two(rows[-1], 0, 2 ** (j - 1)))
    windows = [[of_rows] for of_rows in rows]
    for row in windows:
        for k in range(1, levels[1]):
            row.append(_of_two(row[-1], 1, 2 ** (k - 1)))
    return windows


def _of_two(x: jax.Array, axis: int, distance: int) -> jax.Array:
    return jnp.maximum(x, _shifted(x, axis, distance, -jnp.inf))


def _shifted(x: jax.Array, axis: int, distance: int, fill: float) -> jax.Array:
    """Bring what lies `distance` further along an axis here (back, if it is negative)."""
    distance = int(np.clip(distance, -x.shape[axis], x.shape[axis]))
    pads = [(0, 0, 0)] * x.ndim
    pads[axis] = (-distance, distance, 0)
    return jax.lax.pad(x, jnp.asarray(fill, x.dtype), pads)


def _places(bins: jax.Array, shape: tuple[int, ...], levels: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Return the four windows that cover each bin, as rows of the table of all windows, and which bins are empty.

    [4, R, size, size] int32 and [R, size, size] bool.
    """
    height, width = shape[:2]
    begin, length = bins[:, :, 0], bins[:, :, 1] - bins[:, :, 0]  # [R, 2, size] of rows and columns
    level = jnp.zeros_like(length)
    for power in range(1, max(levels)):
        level = level + (length >= 2**power)
    last = jnp.maximum(begin + length - 2**level, 0)  # where the second window begins
    first = jnp.minimum(begin, jnp.array([height - 1, width - 1])[None, :, None])
    row_level, column_level = level[:, 0, :, None], level[:, 1, None, :]
    table = (row_level * levels[1] + column_level) * (height * width)
    places = [
        table + row[:, 0, :, None] * width + column[:, 1, None, :] for row in (first, last) for column in (first, last)
    ]
    empty = (length[:, 0, :, None] <= 0) | (length[:, 1, None, :] <= 0)
    return jnp.stack(places), empty


def _maxima(feature_map: jax.Array, bins: jax.Array, levels: tuple[int, int]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the pooled values, and of each which of its four windows it is from, and the rows of all windows."""
    table = jnp.concatenate([w.reshape(-1, w.shape[-1]) for row in _windows(feature_map, levels) for w in row])
    places, empty = _places(bins, feature_map.shape, levels)
    best = table[places[0]]  # [R, size, size, C]
    chosen = jnp.zeros(best.shape, jnp.uint8)
    for number in range(1, 4):
        other = table[places[number]]
        chosen = jnp.where(other > best, jnp.uint8(number), chosen)
        best = jnp.maximum(best, other)
    chosen = jnp.where(empty[..., None], jnp.uint8(4), chosen)
    return jnp.where(empty[..., None], 0, best).astype(feature_map.dtype), chosen, places


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _pool(feature_map: jax.Array, bins: jax.Array, levels: tuple[int, int]) -> jax.Array:
    return _maxima(feature_map, bins, levels)[0]


def _forward(feature_map: jax.Array, bins: jax.Array, levels: tuple[int, int]) -> Any:
    pooled, chosen, places = _maxima(feature_map, bins, levels)
    return pooled, (feature_map, chosen, places)


def _backward(levels: tuple[int, int], saved: Any, gradient: jax.Array) -> tuple[jax.Array, None]:
    """Bring the gradient of each bin to its window, and from windows to their halves down to single cells."""
    feature_map, chosen, places = saved
    height, width, channels = feature_map.shape
    gradient = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
    total = jnp.zeros((levels[0] * levels[1] * height * width, channels), gradient.dtype)
    for number in range(4):
        total = total.at[places[number]].add(jnp.where(chosen == number, gradient, 0))
    of_windows = total.reshape(*levels, height, width, channels)
    windows = _windows(feature_map, levels)
    by_row = [_fold(windows[j], [of_windows[j, k] for k in range(levels[1])], axis=1) for j in range(levels[0])]
    of_cells = _fold([row[0] for row in windows], by_row, axis=0)
    return of_cells.astype(feature_map.dtype), None


def _fold(windows: list[jax.Array], gradients: list[jax.Array], axis: int) -> jax.Array:
    """Return the gradient of the smallest windows, of which the others are maxima of two."""
    gradient = gradients[-1]
    for level in range(len(windows) - 1, 0, -1):
        smaller, distance = windows[level - 1], 2 ** (level - 1)
        is_first = smaller == windows[level]
        second = jnp.where(is_first, 0, gradient)
        gradient = gradients[level - 1] + jnp.where(is_first, gradient, 0) + _shifted(second, axis, -distance, 0)
    return gradient


_pool.defvjp(_forward, _backward)
