"""The losses of Faster R-CNN, each over the sample of one image."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from resnet_jax.detection.targets import AnchorSample, RegionSample


def smooth_l1(x: jax.Array, sigma: float) -> jax.Array:
    """Return 0.5 (sigma x)^2 below 1 / sigma^2, and |x| - 0.5 / sigma^2 beyond (Girshick 2015)."""
    square = sigma**2
    return jnp.where(jnp.abs(x) < 1 / square, 0.5 * square * x**2, jnp.abs(x) - 0.5 / square)


def rpn_losses(
    logits: jax.Array, deltas: jax.Array, sample: AnchorSample, *, sigma: float = 3.0
) -> tuple[jax.Array, jax.Array]:
    """Return the mean cross-entropy of the anchors that count, and the loss of the boxes of the positive ones.

    Both are divided by the number of anchors that count.

    Args:
      logits: [N, 2], background and object.
      deltas: [N, 4].
      sample: of the anchors.
      sigma: of smooth_l1().
    """
    number = jnp.maximum(sample.counts.sum(), 1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[sample.anchor], sample.positive.astype(jnp.int32))
    of_boxes = smooth_l1(deltas[sample.anchor] - sample.deltas, sigma).sum(1)
    return (
        jnp.where(sample.counts, losses, 0).sum() / number,
        jnp.where(sample.positive, of_boxes, 0).sum() / number,
    )


def region_losses(
    logits: jax.Array, deltas: jax.Array, sample: RegionSample, *, sigma: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Return the mean cross-entropy of the regions that count, and the loss of the boxes of objects among them.

    Both are divided by the number of regions that count.

    Args:
      logits: [S, K + 1]; class 0 is background.
      deltas: [S, K + 1, 4].
      sample: of the regions.
      sigma: of smooth_l1().
    """
    number = jnp.maximum(sample.counts.sum(), 1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, sample.classes)
    of_class = jnp.take_along_axis(deltas, sample.classes[:, None, None], 1)[:, 0]
    of_boxes = smooth_l1(of_class - sample.deltas, sigma).sum(1)
    is_object = sample.counts & (sample.classes > 0)
    return jnp.where(sample.counts, losses, 0).sum() / number, jnp.where(is_object, of_boxes, 0).sum() / number
