"""Recompute the running statistics of BN for given images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax

from resnet_jax.models.precision import full_float32
from resnet_jax.models.resnet import ResNet


def recalibrate_bn(model: ResNet, variables: dict[str, Any], batches: Iterable[jax.Array]) -> dict[str, Any]:
    """Replace the running statistics by their true average over a data set, as the authors did after training.

    Args:
      model: its running_variance says which variance is averaged.
      variables: `params` and `batch_stats`; not changed.
      batches: normalized images [N, H, W, 3], each batch weighted by its size; one that does not divide into BN groups
        is one group. Keep one size: each costs a compilation.

    Returns:
      Variables with the same params and new batch_stats.

    Raises:
      ValueError: no batch at all, or BN is frozen.
    """
    if model.frozen_bn:
        raise ValueError("the model has frozen_bn=True: its statistics are not to change")
    last_only = model.clone(bn_decay=0.0)  # the update is then the statistics of the batch themselves

    @jax.jit
    def add(total: Any, images: jax.Array) -> Any:
        of_groups = len(images) % (model.bn_group_size or len(images)) == 0
        divided = last_only if of_groups else last_only.clone(bn_group_size=None)
        with full_float32():
            _, updates = divided.apply(variables, images, train=True, mutable=["batch_stats"])
        return jax.tree.map(lambda a, b: a + len(images) * b, total, updates["batch_stats"])

    total = jax.tree.map(jax.numpy.zeros_like, variables["batch_stats"])
    count = 0
    for images in batches:
        total = add(total, images)
        count += len(images)
    if not count:
        raise ValueError("no images to compute the statistics from")
    return {**variables, "batch_stats": jax.tree.map(lambda a: a / count, total)}
