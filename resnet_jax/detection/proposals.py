"""Proposals: the boxes that the RPN thinks to be objects, the best first."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from resnet_jax.detection.boxes import clip, decode
from resnet_jax.detection.nms import first_kept


def propose(
    logits: jax.Array,
    deltas: jax.Array,
    anchors: jax.Array,
    size: jax.Array,
    scale: jax.Array,
    *,
    before: int,
    after: int,
    threshold: float = 0.7,
    min_size: float = 16.0,
) -> tuple[jax.Array, jax.Array]:
    """Return the proposals of an image; no gradient goes through them.

    Args:
      logits: [N, 2], background and object.
      deltas: [N, 4].
      anchors: [N, 4].
      size: [2], height and width.
      scale: pixels of the image to one of the original.
      before, after: boxes before and after suppression.
      threshold: IoU of the suppression.
      min_size: in pixels of the original; smaller boxes are dropped.

    Returns:
      boxes [after, 4] float32, and ok [after] bool.
    """
    logits, deltas = jax.lax.stop_gradient((logits, deltas))
    boxes = clip(decode(anchors, deltas), size)
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    # The difference orders as the probability does, and is not rounded to 1.
    scores = jnp.where((sides >= min_size * scale).all(1), logits[:, 1] - logits[:, 0], -jnp.inf)
    best, order = jax.lax.top_k(scores, min(before, len(boxes)))
    boxes = boxes[order]
    index, ok = first_kept(boxes, best > -jnp.inf, threshold, after)
    return boxes[index], ok
