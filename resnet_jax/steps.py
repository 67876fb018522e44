"""Training and evaluation as pure functions to be jitted: of one batch, and many in one dispatch to the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from chex import ArrayTree

from resnet_jax.config import Precision
from resnet_jax.data.resident import DeviceSplit, Sampler
from resnet_jax.data.types import Batch, HostBatch
from resnet_jax.metrics import Metrics, StepMetrics, StepsReport, compute_metrics
from resnet_jax.models import Model
from resnet_jax.models.precision import full_float32, precision_of_training
from resnet_jax.optim import current_learning_rate


@flax.struct.dataclass
class TrainState:
    """The state after `step` steps: everything that a training step changes.

    Attributes:
      step: int32 scalar.
      params: parameters of the model, float32.
      batch_stats: running statistics of BN, float32; empty for VGG.
      opt_state: state of the optimizer.
    """

    step: jax.Array
    params: ArrayTree
    batch_stats: ArrayTree
    opt_state: ArrayTree


def create_train_state(optimizer: optax.GradientTransformation, variables: Any) -> TrainState:
    """Return the state before the first step, for the initial variables of a model."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(variables["params"]),
    )


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
) -> tuple[jax.Array, tuple[Metrics, ArrayTree]]:
    """Return the mean loss of a batch, and beside it the sums over the batch and the new running statistics."""
    variables = {"params": params, "batch_stats": batch_stats}
    rngs = {"dropout": dropout_key}
    logits, updates = model.apply(variables, batch.images, train=True, mutable=["batch_stats"], rngs=rngs)
    losses = cross_entropy(logits, batch.labels, label_smoothing)  # [N]
    metrics = jax.tree.map(jnp.sum, compute_metrics(logits, losses, batch.labels, batch.mask))
    return losses.mean(), (metrics, updates.get("batch_stats", {}))  # VGG has none


def compute_gradients(
    state: TrainState,
    batch: Batch,
    dropout_key: jax.Array,
    *,
    model: Model,
    label_smoothing: float = 0.0,
    precision: Precision = "default",
) -> Computed:
    """Differentiate the mean loss of a batch."""
    gradient = jax.grad(partial(loss_fn, model=model, label_smoothing=label_smoothing), has_aux=True)
    with precision_of_training(precision):
        grads, (metrics, batch_stats) = gradient(state.params, state.batch_stats, batch, dropout_key)
    return Computed(grads, metrics, batch_stats)


ComputeGradients = Callable[[TrainState, Batch, jax.Array], Computed]


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

    def compute_in_parts(state: TrainState, batch: Batch, dropout_key: jax.Array) -> Computed:
        def add(total: Computed, numbered: tuple[jax.Array, Batch]) -> tuple[Computed, None]:
            number, part = numbered
            computed = compute(state, part, jax.random.fold_in(dropout_key, number))
            changes = jax.tree.map(jnp.subtract, computed.batch_stats, state.batch_stats)
            return jax.tree.map(jnp.add, total, computed._replace(batch_stats=changes)), None

        batches = split_batch(batch, parts, group_size)
        first = jax.tree.map(lambda leaves: leaves[0], batches)
        zero = _zeros(jax.eval_shape(compute, state, first, dropout_key))
        total, _ = jax.lax.scan(add, zero, (jnp.arange(parts), batches))
        grads = jax.tree.map(lambda leaf: leaf / parts, total.grads)
        batch_stats = jax.tree.map(lambda old, leaf: old + leaf / parts, state.batch_stats, total.batch_stats)
        return Computed(grads, total.metrics, batch_stats)

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


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    compute: ComputeGradients,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    dropout_key: jax.Array,
) -> tuple[TrainState, StepMetrics]:
    """Make one step of SGD.

    Args:
      state: before the step.
      batch: normalized and augmented.
      compute: the gradients; see compute_gradients() and accumulate().
      optimizer: see optim.sgd().
      schedule: the optimizer's; only for the report.
      dropout_key: random key, from which that of each step is derived.
    """
    grads, metrics, batch_stats = compute(state, batch, jax.random.fold_in(dropout_key, state.step))
    error = 100 * metrics.wrong["error"] / metrics.count
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, error=error)
    params = optax.apply_updates(state.params, updates)
    report = StepMetrics(
        metrics=metrics,
        learning_rate=current_learning_rate(schedule, state.step, opt_state),
        gradient_norm=optax.tree.norm(grads),
        skipped=jnp.float32(0),
    )
    return TrainState(state.step + 1, params, batch_stats, opt_state), report


def eval_step(state: TrainState, batch: Batch, *, model: Model) -> Metrics:
    """Classify one batch by the running statistics, in full float32; return sums by class."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    with full_float32():
        logits: Any = model.apply(variables, batch.images, train=False)
    return compute_metrics(logits, cross_entropy(logits, batch.labels), batch.labels, batch.mask)


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    dropout_key: jax.Array,
    *,
    label_smoothing: float = 0.0,
    accumulation_steps: int = 1,
    precision: Precision = "default",
) -> TrainStep:
    """Return train_step(state, batch) -> (state, StepMetrics).

    Args:
      model, optimizer, schedule, dropout_key: see train_step().
      label_smoothing: share of the target probability that is spread over all classes; the loss in the report is the
        one that is minimized.
      accumulation_steps: parts that the batch is computed in; see accumulate(). Without BN groups (None) each part has
        statistics of its own.
      precision: of convolutions and matrix products, forward and backward; see OptimConfig.
    """
    compute: ComputeGradients = partial(
        compute_gradients, model=model, label_smoothing=label_smoothing, precision=precision
    )
    if accumulation_steps > 1:
        compute = accumulate(compute, accumulation_steps, model.bn_group_size or 1)
    return partial(train_step, compute=compute, optimizer=optimizer, schedule=schedule, dropout_key=dropout_key)


TrainSteps = Callable[[TrainState, DeviceSplit, jax.Array], tuple[TrainState, StepsReport]]


def make_train_steps(step: TrainStep, sampler: Sampler) -> TrainSteps:
    """Return train_steps(state, split, count) -> (state, StepsReport): `count` steps as one loop on the device.

    The count is an argument of the compiled program: one program makes any number of steps, up to
    sampler.most_steps, and k steps leave the same bits as k times one. The loop ends after a step whose loss or
    gradient is not finite. All of it follows from state.step: nothing else says where the run stands.
    """

    def train_steps(state: TrainState, split: DeviceSplit, count: jax.Array) -> tuple[TrainState, StepsReport]:
        count = jnp.minimum(count, sampler.most_steps)
        orders = sampler.prepare(state.step, count)

        def next_step(state: TrainState) -> tuple[TrainState, StepMetrics]:
            return step(state, sampler.sample(split, state.step, orders))

        def goes_on(carry: tuple[TrainState, StepsReport, jax.Array]) -> jax.Array:
            _, report, finite = carry
            return jnp.less(report.steps, count) & finite

        def body(carry: tuple[TrainState, StepsReport, jax.Array]) -> tuple[TrainState, StepsReport, jax.Array]:
            state, report, _ = carry
            state, last = next_step(state)
            history = jax.tree.map(lambda entries, entry: entries.at[report.steps].set(entry), report.history, last)
            return state, StepsReport(report.steps + 1, history), last.finite

        history = _zeros(jax.eval_shape(next_step, state)[1], sampler.most_steps)
        start = (state, StepsReport(jnp.int32(0), history), jnp.bool(True))
        state, report, _ = jax.lax.while_loop(goes_on, body, start)
        return state, report

    return train_steps


def make_streamed_step(
    step: TrainStep, to_batch: Callable[[HostBatch, jax.Array], Batch]
) -> Callable[[TrainState, HostBatch], tuple[TrainState, StepsReport]]:
    """Return streamed_step(state, host_batch) -> (state, StepsReport): one step on images that were read for it.

    Args:
      step: the training step.
      to_batch: to_batch(host_batch, step), inside the jitted function.
    """

    def streamed_step(state: TrainState, host_batch: HostBatch) -> tuple[TrainState, StepsReport]:
        state, report = step(state, to_batch(host_batch, state.step))
        report = dataclasses.replace(report, skipped=jnp.sum(host_batch.broken >= 0).astype(jnp.float32))
        return state, StepsReport(jnp.int32(1), jax.tree.map(lambda value: jnp.asarray(value)[None], report))

    return streamed_step


def finite_parts(state: TrainState) -> dict[str, jax.Array]:
    """Tell of each part of a state, by its name in messages, whether all its numbers are finite: bool scalars.

    Loss and gradient of a step are computed before its update and say nothing about what comes out of it. Scalars do
    not count: a schedule may begin with an infinite one.
    """

    def finite(tree: Any) -> jax.Array:
        arrays = [leaf for leaf in jax.tree.leaves(tree) if jnp.ndim(leaf)]
        return jnp.array([jnp.isfinite(array).all() for array in arrays], bool).all()

    parts = {
        "parameters": state.params,
        "running statistics of BN": state.batch_stats,
        "state of the optimizer": state.opt_state,
    }
    return {name: finite(tree) for name, tree in parts.items()}


def _zeros(abstract: Any, *leading: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros((*leading, *leaf.shape), leaf.dtype), abstract)
