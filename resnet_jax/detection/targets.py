"""What the two networks are trained on: a sample of anchors, and a sample of regions, of one image."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from resnet_jax.detection.boxes import encode, iou


class Objects(NamedTuple):
    """The objects of an image that it is trained on.

    Attributes:
      boxes: [G, 4] float32.
      classes: [G] int32 from 1 on; 0 fills up.
    """

    boxes: jax.Array
    classes: jax.Array


class AnchorSample(NamedTuple):
    """Anchors to train the RPN on, [S] each.

    Attributes:
      anchor: int32, its number.
      positive: bool, whether it should be an object.
      counts: bool, False for what fills up.
      deltas: [S, 4], to the object that it overlaps most.
    """

    anchor: jax.Array
    positive: jax.Array
    counts: jax.Array
    deltas: jax.Array


class RegionSample(NamedTuple):
    """Regions to train the second network on, [S] each.

    Attributes:
      boxes: [S, 4].
      classes: int32, 0 for background.
      counts: bool, False for what fills up.
      deltas: [S, 4], to the object of a region that is no background; in units of the target's deviations.
    """

    boxes: jax.Array
    classes: jax.Array
    counts: jax.Array
    deltas: jax.Array


def sample_anchors(
    key: jax.Array,
    anchors: jax.Array,
    objects: Objects,
    size: jax.Array,
    *,
    samples: int = 256,
    positive: float = 0.7,
    negative: float = 0.3,
) -> AnchorSample:
    """Sample anchors, half of them positive where there are enough.

    Positive are those that overlap an object by `positive`, and of each object those that overlap it most; negative are
    others that overlap each by less than `negative`. Anchors beyond the borders do not take part.

    Args:
      key: random key.
      anchors: [N, 4].
      objects: of the image.
      size: [2], height and width.
      samples: anchors at most; the rest of the rows does not count.
      positive, negative: IoU.

    Returns:
      1.5 times `samples` rows, of which up to `samples` count.
    """
    inside = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] < size[1]) & (anchors[:, 3] < size[0])
    overlaps = jnp.where(inside[:, None] & (objects.classes > 0), iou(anchors, objects.boxes), 0)  # [N, G]
    highest = overlaps.max(1)
    # An object that no anchor touches has a highest overlap of 0, which is no reason to take all that touch nothing.
    of_object = overlaps.max(0)
    best = ((overlaps == of_object) & (of_object > 0)).any(1)
    positives = inside & (best | (highest >= positive))
    negatives = inside & ~positives & (highest < negative)
    drawn = jax.random.uniform(key, (len(anchors),))
    of_positives, index_positive = jax.lax.top_k(jnp.where(positives, drawn, -1), samples // 2)
    of_negatives, index_negative = jax.lax.top_k(jnp.where(negatives, drawn, -1), samples)
    is_positive = of_positives >= 0
    is_negative = (of_negatives >= 0) & (jnp.arange(samples) < samples - is_positive.sum())
    index = jnp.concatenate([index_positive, index_negative])
    target = objects.boxes[overlaps[index].argmax(1)]
    deltas = encode(anchors[index], target)
    chosen = jnp.concatenate([is_positive, jnp.zeros_like(is_negative)])
    return AnchorSample(
        index, chosen, jnp.concatenate([is_positive, is_negative]), jnp.where(chosen[:, None], deltas, 0)
    )


def sample_regions(
    key: jax.Array,
    boxes: jax.Array,
    ok: jax.Array,
    objects: Objects,
    *,
    samples: int = 128,
    foreground: float = 0.25,
    foreground_iou: float = 0.5,
    background_iou: tuple[float, float] = (0.1, 0.5),
    target_std: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2),
) -> RegionSample:
    """Sample regions from proposals and the objects themselves.

    Args:
      key: random key.
      boxes: [N, 4], the proposals.
      ok: [N] bool, False for what is no proposal.
      objects: of the image.
      samples: regions.
      foreground: the largest share of regions that overlap an object by `foreground_iou`.
      foreground_iou: IoU.
      background_iou: IoU of background, from the first up to but without the second. In an image without objects all
        proposals are background.
      target_std: what deltas are divided by.
    """
    exists = objects.classes > 0
    boxes, ok = jnp.concatenate([boxes, objects.boxes]), jnp.concatenate([ok, exists])
    overlaps = jnp.where(exists, iou(boxes, objects.boxes), 0)
    highest, nearest = overlaps.max(1), overlaps.argmax(1)
    low, high = background_iou
    is_foreground = ok & (highest >= foreground_iou)
    is_background = ok & (highest < high) & ((highest >= low) | ~exists.any())
    drawn = jax.random.uniform(key, (len(boxes),))
    most = round(foreground * samples)
    # Among the foreground, those drawn highest; then background; then what does not count.
    of_foreground, _ = jax.lax.top_k(jnp.where(is_foreground, drawn, -1), min(most, len(boxes)))
    taken = is_foreground & (drawn >= of_foreground[-1])
    rank, index = jax.lax.top_k(jnp.where(taken, 2, jnp.where(is_background, 1, 0)) + drawn, samples)
    classes = jnp.where(rank >= 2, objects.classes[nearest[index]], 0)
    chosen = boxes[index]
    deltas = encode(chosen, objects.boxes[nearest[index]]) / jnp.array(target_std)
    deltas = jnp.where((classes > 0)[:, None], deltas, 0)
    return RegionSample(*jax.lax.stop_gradient((chosen, classes, rank >= 1, deltas)))
