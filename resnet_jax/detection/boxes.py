"""Boxes: overlap, the coding that networks are trained on, clipping.

A box is x1, y1, x2, y2. As in 2015 the last pixel belongs to it, so that it is x2 - x1 + 1 wide; `one` is what is
added: 0.0 makes boxes continuous, as later code has them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# exp() beyond it would be infinite, and an infinite box poison a step; no image is larger than 1000 / 16 base anchors.
_MOST_LOG_SCALE = math.log(1000 / 16)


def _widths_heights(boxes: jax.Array, one: float) -> tuple[jax.Array, jax.Array]:
    return boxes[..., 2] - boxes[..., 0] + one, boxes[..., 3] - boxes[..., 1] + one


def iou(a: jax.Array, b: jax.Array, one: float = 1.0) -> jax.Array:
    """Return the intersection over the union of boxes a [N, 4] and b [M, 4]: [N, M]; 0 where the union is empty."""
    low = jnp.maximum(a[:, None, :2], b[None, :, :2])
    high = jnp.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = jnp.maximum(high - low + one, 0)
    both = sides[..., 0] * sides[..., 1]
    areas = [width * height for width, height in (_widths_heights(a, one), _widths_heights(b, one))]
    union = areas[0][:, None] + areas[1][None] - both
    return jnp.where(union > 0, both / jnp.where(union > 0, union, 1), 0)


def encode(boxes: jax.Array, targets: jax.Array, one: float = 1.0) -> jax.Array:
    """Return the deltas [..., 4] that lead from boxes to targets: shift of the centre by size, log of the scale."""
    width, height = _widths_heights(boxes, one)
    target_width, target_height = _widths_heights(targets, one)
    x, y = boxes[..., 0] + width / 2, boxes[..., 1] + height / 2
    target_x, target_y = targets[..., 0] + target_width / 2, targets[..., 1] + target_height / 2
    scales = jnp.log(target_width / width), jnp.log(target_height / height)
    return jnp.stack([(target_x - x) / width, (target_y - y) / height, *scales], -1)


def decode(boxes: jax.Array, deltas: jax.Array, one: float = 1.0) -> jax.Array:
    """Apply deltas [..., 4] to boxes [..., 4].

    As in py-faster-rcnn the right and lower border lack the -1 of an inclusive pixel: decode(b, encode(b, t)) is t with
    one more pixel there. Networks are trained on it.
    """
    width, height = _widths_heights(boxes, one)
    x = boxes[..., 0] + width / 2 + deltas[..., 0] * width
    y = boxes[..., 1] + height / 2 + deltas[..., 1] * height
    half_width = jnp.exp(jnp.minimum(deltas[..., 2], _MOST_LOG_SCALE)) * width / 2
    half_height = jnp.exp(jnp.minimum(deltas[..., 3], _MOST_LOG_SCALE)) * height / 2
    return jnp.stack([x - half_width, y - half_height, x + half_width, y + half_height], -1)


def clip(boxes: jax.Array, size: jax.Array, one: float = 1.0) -> jax.Array:
    """Move the borders of boxes [..., 4] into an image of `size` (height, width)."""
    height, width = size[0] - one, size[1] - one
    return jnp.clip(boxes, 0, jnp.stack([width, height, width, height]))
