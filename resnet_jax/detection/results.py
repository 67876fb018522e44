"""From the scores and boxes of regions to what is found in an image."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from resnet_jax.detection.boxes import clip, decode
from resnet_jax.detection.nms import suppress


class Found(NamedTuple):
    """What is found in an image, the best first.

    Attributes:
      boxes: [M, 4] float32, in pixels of the original image.
      scores: [M] float32, probabilities; 0 where there is nothing.
      classes: [M] int32, from 0 on.
    """

    boxes: jax.Array
    scores: jax.Array
    classes: jax.Array


def find(
    logits: jax.Array,
    deltas: jax.Array,
    regions: jax.Array,
    ok: jax.Array,
    size: jax.Array,
    *,
    target_std: tuple[float, float, float, float],
    nms: float = 0.3,
    threshold: float = 0.05,
    most: int = 100,
) -> Found:
    """Decode the boxes of each class, suppress within each, and take the best over all classes.

    Args:
      logits: [R, K + 1]; class 0 is background.
      deltas: [R, K + 1, 4], in units of target_std.
      regions: [R, 4], in pixels of the original image.
      ok: [R] bool, False for what is no region.
      size: [2], height and width of the original image.
      target_std: see targets.sample_regions().
      nms: IoU of the suppression.
      threshold: lowest score, excluded.
      most: boxes of all classes.
    """
    probabilities = jax.nn.softmax(logits)[:, 1:].T  # [K, R]
    boxes = clip(decode(regions[:, None], deltas * jnp.array(target_std)), size)[:, 1:].swapaxes(0, 1)  # [K, R, 4]
    scores = jnp.where(ok & (probabilities > threshold), probabilities, 0)

    order = jnp.argsort(-scores, axis=1)
    scores = jnp.take_along_axis(scores, order, 1)
    boxes = jnp.take_along_axis(boxes, order[..., None], 1)
    kept = jax.vmap(partial(suppress, threshold=nms))(boxes, scores > 0)
    best, place = jax.lax.top_k(jnp.where(kept, scores, 0).reshape(-1), min(most, scores.size))
    return Found(boxes.reshape(-1, 4)[place], best, (place // scores.shape[1]).astype(jnp.int32))
