"""The gradient of a batch: at once, in parts one after the other, or of a part on each device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from chex import ArrayTree
from jax.flatten_util import ravel_pytree
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from resnet_jax.config import Precision
from resnet_jax.data.types import Batch
from resnet_jax.metrics import Metrics, compute_metrics
from resnet_jax.models import Model
from resnet_jax.models.precision import precision_of_training


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Return the cross-entropy [N] of logits [N, num_classes] to labels [N] int32.

    With smoothing the target is (1 - label_smoothing) for the label, and label_smoothing / num_classes more for every
    class (Szegedy et al. 2016, "Rethinking the Inception Architecture").
    """
    if not label_smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


class Computed(NamedTuple):
    """What a batch says, before the update.

    Attributes:
      grads: gradient of the mean loss.
      metrics: sums over the batch and all classes.
      batch_stats: the new running statistics.
    """

    grads: ArrayTree
    metrics: Metrics
    batch_stats: ArrayTree


def loss_fn(
    params: ArrayTree,
    batch_stats: ArrayTree,
    batch: Batch,
    dropout_key: jax.Array,
    *,
    model: Model,
    label_smoothing: float = 0.0,
    class_weights: ArrayLike | None = None,
) -> tuple[jax.Array, tuple[Metrics, ArrayTree]]:
    """Return the mean loss of a batch, and beside it the sums over the batch and the new running statistics.

    With class_weights [num_classes] the loss of each image is multiplied by that of its class.
    """
    variables = {"params": params, "batch_stats": batch_stats}
    rngs = {"dropout": dropout_key}
    logits, updates = model.apply(variables, batch.images, train=True, mutable=["batch_stats"], rngs=rngs)
    losses = cross_entropy(logits, batch.labels, label_smoothing)  # [N]
    if class_weights is not None:
        losses = losses * jnp.asarray(class_weights)[batch.labels]
    metrics = jax.tree.map(jnp.sum, compute_metrics(logits, losses, batch.labels, batch.mask))
    return losses.mean(), (metrics, updates.get("batch_stats", {}))  # VGG has none


def compute_gradients(
    params: ArrayTree,
    batch_stats: ArrayTree,
    batch: Batch,
    dropout_key: jax.Array,
    *,
    model: Model,
    label_smoothing: float = 0.0,
    class_weights: ArrayLike | None = None,
    precision: Precision = "default",
) -> Computed:
    """Differentiate the mean loss of a batch."""
    loss = partial(loss_fn, model=model, label_smoothing=label_smoothing, class_weights=class_weights)
    gradient = jax.grad(loss, has_aux=True)
    with precision_of_training(precision):
        grads, (metrics, batch_stats) = gradient(params, batch_stats, batch, dropout_key)
    return Computed(grads, metrics, batch_stats)


ComputeGradients = Callable[[ArrayTree, ArrayTree, Batch, jax.Array], Computed]  # as compute_gradients()


def accumulate(compute: ComputeGradients, parts: int, group_size: int) -> ComputeGradients:
    """Return what computes a batch in parts, one after the other, to save memory.

    Each part has whole BN groups, begins with the same running statistics and counts the same: but for rounding and
    dropout, their number does not matter. BN moves by the mean change of the parts, which is exactly none if it is
    frozen.

    Args:
      compute: for a part.
      parts: how many.
      group_size: images of a BN group, or 1.
    """

    def compute_in_parts(params: ArrayTree, batch_stats: ArrayTree, batch: Batch, dropout_key: jax.Array) -> Computed:
        def add(total: Computed, numbered: tuple[jax.Array, Batch]) -> tuple[Computed, None]:
            number, part = numbered
            computed = compute(params, batch_stats, part, jax.random.fold_in(dropout_key, number))
            changes = jax.tree.map(jnp.subtract, computed.batch_stats, batch_stats)
            return jax.tree.map(jnp.add, total, computed._replace(batch_stats=changes)), None

        batches = split_batch(batch, parts, group_size)
        first = jax.tree.map(lambda leaves: leaves[0], batches)
        shapes = jax.eval_shape(compute, params, batch_stats, first, dropout_key)
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(add, zero, (jnp.arange(parts), batches))
        grads = jax.tree.map(lambda leaf: leaf / parts, total.grads)
        moved = jax.tree.map(lambda old, leaf: old + leaf / parts, batch_stats, total.batch_stats)
        return Computed(grads, total.metrics, moved)

    return compute_in_parts


def split_batch(batch: Batch, parts: int, group_size: int) -> Batch:
    """Divide a batch [N, ...] into parts [parts, N / parts, ...] of whole BN groups.

    Part j has the groups j, j + parts, j + 2 parts, ...: of a batch that lies divided over devices, each part does,
    too, and no image moves.
    """

    def split(leaf: jax.Array) -> jax.Array:
        groups = leaf.reshape(-1, parts, group_size, *leaf.shape[1:])
        return groups.swapaxes(0, 1).reshape(parts, -1, *leaf.shape[1:])

    return jax.tree.map(split, batch)


def on_each_device(compute: ComputeGradients, mesh: Mesh | AbstractMesh) -> ComputeGradients:
    """Return what computes the images of each device there, by `compute`, and adds up all of it in one all-reduce.

    The sum is that of one vector of float32: gradients, metrics and running statistics. Left to itself, XLA makes a
    sum of each array, and of bfloat16 activations sums the gradients in bfloat16.

    Args:
      compute: for the images of a device; no BN group may have images of two.
      mesh: of one axis, along which batches are divided.
    """
    (axis,) = mesh.axis_names

    def of_device(params: ArrayTree, batch_stats: ArrayTree, batch: Batch, dropout_key: jax.Array) -> Computed:
        vector, unravel = ravel_pytree(compute(params, batch_stats, batch, dropout_key))
        total = unravel(jax.lax.psum(vector, axis))
        grads, moved = jax.tree.map(lambda leaf: leaf / mesh.size, (total.grads, total.batch_stats))
        return Computed(grads, total.metrics, moved)

    # Without its checks the gradient of a parameter is that of this device's images, to be summed above.
    return jax.shard_map(of_device, mesh=mesh, in_specs=(P(), P(), P(axis), P()), out_specs=P(), check_vma=False)
