"""Detection as pure functions to be jitted: the gradients of a batch of images, and what is found in them."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

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
from resnet_jax.models.detector import Detector
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
    precision: Precision = "default",
) -> Computed:
    """Differentiate the four losses of a batch, the mean over its images.

    Args:
      params, batch_stats: of the detector.
      batch: with normalized images.
      key: random key, from which that of each image follows by its row.
      model, config: what is trained.
      filled: whether all images fill their arrays.
      precision: of convolutions and matrix products; see OptimConfig.
    """
    loss = partial(_loss, model=model, config=config, filled=filled)
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
) -> tuple[jax.Array, tuple[DetectionMetrics, Any]]:
    apply = partial(model.apply, train=True, mutable=["batch_stats"])
    rngs = {"dropout": jax.random.fold_in(key, 2**31 - 1 - batch.row[0])}
    variables = {"params": params, "batch_stats": batch_stats}
    of_images, updates = apply(variables, batch.images, None if filled else batch.sizes, method="of_images")
    anchors = jnp.asarray(model.anchors(*of_images.feature_map.shape[1:3]))

    def sample(row: jax.Array, logits: jax.Array, deltas: jax.Array, objects: Objects, size: Any, scale: Any) -> Any:
        keys = jax.random.split(jax.random.fold_in(key, row))
        of_anchors = sample_anchors(
            keys[0],
            anchors,
            objects,
            size,
            samples=config.rpn_samples,
            positive=config.rpn_positive,
            negative=config.rpn_negative,
        )
        before, after = config.train_proposals
        boxes, ok = propose(
            logits,
            deltas,
            anchors,
            size,
            scale,
            before=before,
            after=after,
            threshold=config.rpn_nms,
            min_size=config.min_size,
        )
        of_regions = sample_regions(
            keys[1],
            boxes,
            ok,
            objects,
            samples=config.regions,
            foreground=config.foreground,
            background_iou=config.background_iou,
            target_std=config.target_std,
        )
        return of_anchors, of_regions

    objects = Objects(batch.boxes, batch.classes)
    heads = jax.lax.stop_gradient((of_images.logits, of_images.deltas))
    of_anchors, of_regions = jax.vmap(sample)(batch.row, *heads, objects, batch.sizes, batch.scales)
    variables = {"params": params, "batch_stats": {**batch_stats, **updates.get("batch_stats", {})}}
    (logits, deltas), updates = apply(
        variables, of_images.feature_map, of_regions.boxes, method="of_regions", rngs=rngs
    )
    rpn = jax.vmap(rpn_losses)(of_images.logits, of_images.deltas, of_anchors)
    regions = jax.vmap(region_losses)(logits, deltas, of_regions)
    losses = dict(zip(LOSSES, (*rpn, *regions), strict=True))
    wrong = of_regions.counts & (logits.argmax(-1) != of_regions.classes)
    metrics = DetectionMetrics(
        losses={name: values.sum() for name, values in losses.items()},
        positives=of_anchors.positive.sum().astype(jnp.float32),
        foreground=(of_regions.counts & (of_regions.classes > 0)).sum().astype(jnp.float32),
        regions=of_regions.counts.sum().astype(jnp.float32),
        wrong=wrong.sum().astype(jnp.float32),
        count=jnp.float32(len(batch.row)),
    )
    stats = {**variables["batch_stats"], **updates.get("batch_stats", {})}
    return jnp.stack([values.mean() for values in losses.values()]).sum(), (metrics, stats)


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
) -> FoundInImages:
    """Find the objects in a batch of images, in full float32."""
    batch = to_batch(batch, preprocessing)
    with full_float32():
        of_images: Any = model.apply(
            variables, batch.images, None if filled else batch.sizes, train=False, method="of_images"
        )
        anchors = jnp.asarray(model.anchors(*of_images.feature_map.shape[1:3]))
        before, after = config.test_proposals

        def proposals_of(logits: jax.Array, deltas: jax.Array, size: Any, scale: Any) -> Any:
            how = {"threshold": config.rpn_nms, "min_size": config.min_size}
            return propose(logits, deltas, anchors, size, scale, before=before, after=after, **how)

        regions, ok = jax.vmap(proposals_of)(of_images.logits, of_images.deltas, batch.sizes, batch.scales)
        of_regions: Any = model.apply(variables, of_images.feature_map, regions, train=False, method="of_regions")
        regions = regions / batch.scales[:, None, None]
        how: Any = {name: getattr(config, name) for name in ("target_std", "nms", "threshold", "most")}
        found: Any = jax.vmap(lambda *of_image: find(*of_image, **how))(*of_regions, regions, ok, batch.original)
    return FoundInImages(found, regions, ok)


def by_device(find: Any, mesh: Any) -> Any:
    """Return find(variables, batch) with the images of each device computed there: no suppression waits for another."""
    (axis,) = mesh.axis_names
    return jax.shard_map(find, mesh=mesh, in_specs=(P(), P(axis)), out_specs=P(axis), check_vma=False)
