"""Detection as pure functions to be jitted: the gradients of a batch of images, and what is found in them."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from chex import ArrayTree
from jax.sharding import PartitionSpec as P

from resnet_jax.config import DetectionConfig, Precision
from resnet_jax.data.annotated import Boxed
from resnet_jax.data.augment import normalize
from resnet_jax.data.types import Preprocessing
from resnet_jax.detection.losses import region_losses, rpn_losses
from resnet_jax.detection.proposals import propose
from resnet_jax.detection.results import Found, find
from resnet_jax.detection.targets import Objects, sample_anchors, sample_regions
from resnet_jax.detection_metrics import LOSSES, DetectionMetrics
from resnet_jax.gradients import Computed
from resnet_jax.models.detector import Detector, OfImages
from resnet_jax.models.precision import full_float32, precision_of_training


def detection_gradients(
    params: ArrayTree,
    batch_stats: ArrayTree,
    batch: Boxed,
    key: jax.Array,
    *,
    model: Detector,
    config: DetectionConfig,
    filled: bool,
    losses: Literal["both", "rpn", "regions"] = "both",
    separate: bool = False,
    precision: Precision = "default",
) -> Computed:
    """Differentiate the losses of a batch, the mean over its images.

    Args:
      params, batch_stats: of the detector.
      batch: with normalized images.
      key: random key, from which that of each image follows by its row.
      model, config: what is trained.
      filled: whether all images fill their arrays.
      losses, separate: see Stage.
      precision: of convolutions and matrix products; see OptimConfig.
    """
    loss = partial(_loss, model=model, config=config, filled=filled, which=losses, separate=separate)
    with precision_of_training(precision):
        grads, (metrics, batch_stats) = jax.grad(loss, has_aux=True)(params, batch_stats, batch, key)
    return Computed(grads, metrics, batch_stats)


def _loss(
    params: Any,
    batch_stats: Any,
    batch: Boxed,
    key: jax.Array,
    *,
    model: Detector,
    config: DetectionConfig,
    filled: bool,
    which: str,
    separate: bool,
) -> tuple[jax.Array, tuple[DetectionMetrics, Any]]:
    apply = partial(model.apply, train=True, mutable=["batch_stats"])
    variables = {"params": params, "batch_stats": batch_stats}
    sizes = None if filled else batch.sizes
    of_images, updates = apply(variables, batch.images, sizes, separate=separate, method="of_images")
    stats = {**batch_stats, **updates.get("batch_stats", {})}
    anchors = jnp.asarray(model.anchors(*of_images.feature_map.shape[1:3]))
    objects = Objects(batch.boxes, batch.classes)
    keys = jax.vmap(lambda row: jax.random.split(jax.random.fold_in(key, row)))(batch.row)
    zero = jnp.zeros(len(batch.row))
    losses = dict.fromkeys(LOSSES, zero)
    positives = foreground = regions = wrong = jnp.float32(0)
    if which != "regions":
        draw = partial(
            sample_anchors,
            samples=config.rpn_samples,
            positive=config.rpn_positive,
            negative=config.rpn_negative,
        )
        of_anchors = jax.vmap(draw, in_axes=(0, None, 0, 0))(keys[:, 0], anchors, objects, batch.sizes)
        rpn = jax.vmap(rpn_losses)(of_images.logits, of_images.deltas, of_anchors)
        losses |= dict(zip(LOSSES[:2], rpn, strict=True))
        positives = of_anchors.positive.sum().astype(jnp.float32)
    if which != "rpn":
        boxes, ok = _proposals(of_images, anchors, batch, config, config.train_proposals)
        choose = partial(
            sample_regions,
            samples=config.regions,
            foreground=config.foreground,
            background_iou=config.background_iou,
            target_std=config.target_std,
        )
        of_regions = jax.vmap(choose)(keys[:, 1], boxes, ok, objects)
        (logits, deltas), updates = apply(
            {"params": params, "batch_stats": stats},
            of_images.feature_map,
            of_regions.boxes,
            method="of_regions",
            rngs={"dropout": jax.random.fold_in(key, 2**31 - 1 - batch.row[0])},
        )
        stats = {**stats, **updates.get("batch_stats", {})}
        losses |= dict(zip(LOSSES[2:], jax.vmap(region_losses)(logits, deltas, of_regions), strict=True))
        foreground = (of_regions.counts & (of_regions.classes > 0)).sum().astype(jnp.float32)
        regions = of_regions.counts.sum().astype(jnp.float32)
        wrong = (of_regions.counts & (logits.argmax(-1) != of_regions.classes)).sum().astype(jnp.float32)
    metrics = DetectionMetrics(
        {name: values.sum() for name, values in losses.items()},
        positives=positives,
        foreground=foreground,
        regions=regions,
        wrong=wrong,
        count=jnp.float32(len(batch.row)),
    )
    return jnp.stack([values.mean() for values in losses.values()]).sum(), (metrics, stats)


def _proposals(
    of_images: OfImages, anchors: jax.Array, batch: Boxed, config: DetectionConfig, numbers: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Return the proposals of each image: [B, after, 4], and which of them there are [B, after]."""
    before, after = numbers
    how: Any = {"before": before, "after": after, "threshold": config.rpn_nms, "min_size": config.min_size}
    return jax.vmap(lambda logits, deltas, size, scale: propose(logits, deltas, anchors, size, scale, **how))(
        of_images.logits, of_images.deltas, batch.sizes, batch.scales
    )


def to_batch(batch: Boxed, preprocessing: Preprocessing) -> Boxed:
    """Normalize the images of a batch, inside a jitted function."""
    return batch._replace(images=normalize(batch.images, *preprocessing))


class FoundInImages(NamedTuple):
    """What is found in the images of a batch, and the proposals that it began with, in pixels of the originals.

    Attributes:
      found: see results.Found; each with a leading dimension B.
      proposals: [B, P, 4].
      ok: [B, P] bool.
    """

    found: Found
    proposals: jax.Array
    ok: jax.Array


def find_in_images(
    variables: Any,
    batch: Boxed,
    *,
    model: Detector,
    config: DetectionConfig,
    preprocessing: Preprocessing,
    filled: bool,
    separate: bool = False,
) -> FoundInImages:
    """Find the objects in a batch of images, in full float32; see detection_gradients()."""
    batch = to_batch(batch, preprocessing)
    apply = partial(model.apply, variables, train=False)
    with full_float32():
        of_images: Any = apply(batch.images, None if filled else batch.sizes, separate=separate, method="of_images")
        anchors = jnp.asarray(model.anchors(*of_images.feature_map.shape[1:3]))
        regions, ok = _proposals(of_images, anchors, batch, config, config.test_proposals)
        of_regions: Any = apply(of_images.feature_map, regions, method="of_regions")
        regions = regions / batch.scales[:, None, None]
        how: Any = {name: getattr(config, name) for name in ("target_std", "nms", "threshold", "most")}
        found: Any = jax.vmap(lambda *of_image: find(*of_image, **how))(*of_regions, regions, ok, batch.original)
    return FoundInImages(found, regions, ok)


def by_device(find: Any, mesh: Any) -> Any:
    """Return find(variables, batch) with the images of each device computed there: no suppression waits for another."""
    (axis,) = mesh.axis_names
    return jax.shard_map(find, mesh=mesh, in_specs=(P(), P(axis)), out_specs=P(axis), check_vma=False)
