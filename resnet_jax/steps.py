"""Training and evaluation as pure functions to be jitted: of one batch, and many in one dispatch to the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from resnet_jax.data.pipeline import Batch, DeviceSplit, Sampler, TakeBatch
from resnet_jax.metrics import Metrics, compute_metrics
from resnet_jax.models import Model
from resnet_jax.optim import current_learning_rate
from resnet_jax.train_state import TrainState


@flax.struct.dataclass
class StepMetrics:
    """What one training step reports; float32 scalars, or [steps] for several.

    Attributes:
      metrics: sums over the batch and all classes, in training mode, before the update.
      learning_rate: of the update.
      gradient_norm: L2 norm of the gradient of the loss, without weight decay.
      skipped: images that could not be read and were replaced by others.
    """

    metrics: Metrics
    learning_rate: Any
    gradient_norm: Any
    skipped: Any

    @property
    def finite(self) -> Any:
        """Whether loss and gradient are finite."""
        return jnp.isfinite(self.metrics.loss) & jnp.isfinite(self.gradient_norm)


@flax.struct.dataclass
class StepsReport:
    """What a dispatch of training steps reports.

    Attributes:
      steps: how many were made: fewer than asked for if the last of them was not finite. int32 scalar.
      history: one entry a step, [most_steps]; those beyond `steps` are zero.
    """

    steps: Any
    history: StepMetrics


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
TrainSteps = Callable[[TrainState, DeviceSplit, jax.Array], tuple[TrainState, StepsReport]]
EvalStep = Callable[[TrainState, Batch], Metrics]
AddEvaluation = Callable[[Metrics, TrainState, DeviceSplit, jax.Array], Metrics]


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    dropout_key: jax.Array,
    *,
    label_smoothing: float = 0.0,
    accumulation_steps: int = 1,
) -> TrainStep:
    """Return train_step(state, batch) -> (state, StepMetrics).

    Args:
      model: the network.
      optimizer: see optim.sgd().
      schedule: the optimizer's; only for the report.
      dropout_key: random key, from which that of each step is derived.
      label_smoothing: share of the target probability that is spread over all classes; the loss in the report is the
        one that is minimized.
      accumulation_steps: parts that the batch is computed in, one after the other. Each has whole BN groups, begins
        with the same running statistics and counts the same: but for rounding and dropout, their number does not
        matter. Without BN groups (None) each part has statistics of its own.
    """

    def compute(state: TrainState, batch: Batch, key: jax.Array) -> tuple[Any, Metrics, Any]:
        """Return the gradient of the mean loss, sums over the batch, and the new running statistics."""

        def mean_loss(params: Any) -> Any:
            variables = {"params": params, "batch_stats": state.batch_stats}
            rngs = {"dropout": key}
            logits, updates = model.apply(variables, batch.images, train=True, mutable=["batch_stats"], rngs=rngs)
            losses = cross_entropy(logits, batch.labels, label_smoothing)
            return losses.mean(), (logits, losses, updates.get("batch_stats", {}))  # VGG has none

        grads, (logits, losses, batch_stats) = jax.grad(mean_loss, has_aux=True)(state.params)
        metrics = jax.tree.map(jnp.sum, compute_metrics(logits, losses, batch.labels, batch.mask))
        return grads, metrics, batch_stats

    def compute_in_parts(state: TrainState, batch: Batch, key: jax.Array) -> tuple[Any, Metrics, Any]:
        """Do the same in several parts; BN moves by their mean change, which is exactly none if it is frozen."""

        def add(total: Any, numbered: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            number, part = numbered
            grads, metrics, batch_stats = compute(state, part, jax.random.fold_in(key, number))
            changes = jax.tree.map(jnp.subtract, batch_stats, state.batch_stats)
            return jax.tree.map(jnp.add, total, (grads, metrics, changes)), None

        parts = split_batch(batch, accumulation_steps, getattr(model, "bn_group_size", None) or 1)
        first = jax.tree.map(lambda leaves: leaves[0], parts)
        zero = _zeros(jax.eval_shape(compute, state, first, key))
        (grads, metrics, changes), _ = jax.lax.scan(add, zero, (jnp.arange(accumulation_steps), parts))
        grads = jax.tree.map(lambda total: total / accumulation_steps, grads)
        batch_stats = jax.tree.map(lambda old, total: old + total / accumulation_steps, state.batch_stats, changes)
        return grads, metrics, batch_stats

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(dropout_key, state.step)
        grads, metrics, batch_stats = (compute if accumulation_steps == 1 else compute_in_parts)(state, batch, key)
        error = 100 * metrics.errors / metrics.count
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, error=error)
        report = StepMetrics(
            metrics=metrics,
            learning_rate=current_learning_rate(schedule, state.step, opt_state),
            gradient_norm=optax.tree.norm(grads),
            skipped=jnp.float32(0),
        )
        state = TrainState(state.step + 1, optax.apply_updates(state.params, updates), batch_stats, opt_state)
        return state, report

    return train_step


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Return the cross-entropy [N] of logits [N, num_classes] to labels [N] int32.

    With smoothing the target is (1 - label_smoothing) for the label, and label_smoothing / num_classes more for every
    class (Szegedy et al. 2016, "Rethinking the Inception Architecture").
    """
    if not label_smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def split_batch(batch: Batch, parts: int, group_size: int) -> Batch:
    """Divide a batch [N, ...] into parts [parts, N / parts, ...] of whole BN groups.

    Part j has the groups j, j + parts, j + 2 parts, ...: of a batch that lies divided over devices, each part does,
    too, and no image moves.
    """

    def split(leaf: jax.Array) -> jax.Array:
        groups = leaf.reshape(-1, parts, group_size, *leaf.shape[1:])
        return groups.swapaxes(0, 1).reshape(parts, -1, *leaf.shape[1:])

    return jax.tree.map(split, batch)


def make_train_steps(train_step: TrainStep, sampler: Sampler) -> TrainSteps:
    """Return train_steps(state, split, count) -> (state, StepsReport): `count` steps as one loop on the device.

    The count is an argument of the compiled program: one program makes any number of steps, up to
    sampler.most_steps, and k steps leave the same bits as k times one. The loop ends after a step whose loss or
    gradient is not finite. All of it follows from state.step: nothing else says where the run stands.
    """

    def train_steps(state: TrainState, split: DeviceSplit, count: jax.Array) -> tuple[TrainState, StepsReport]:
        count = jnp.minimum(count, sampler.most_steps)
        orders = sampler.prepare(state.step, count)

        def step(state: TrainState) -> tuple[TrainState, StepMetrics]:
            return train_step(state, sampler.sample(split, state.step, orders))

        def goes_on(carry: tuple[TrainState, StepsReport, jax.Array]) -> jax.Array:
            _, report, finite = carry
            return (report.steps < count) & finite

        def body(carry: tuple[TrainState, StepsReport, jax.Array]) -> tuple[TrainState, StepsReport, jax.Array]:
            state, report, _ = carry
            state, last = step(state)
            history = jax.tree.map(lambda entries, entry: entries.at[report.steps].set(entry), report.history, last)
            return state, StepsReport(report.steps + 1, history), last.finite

        history = _zeros(jax.eval_shape(step, state)[1], sampler.most_steps)
        start = (state, StepsReport(jnp.int32(0), history), jnp.bool(True))
        state, report, _ = jax.lax.while_loop(goes_on, body, start)
        return state, report

    return train_steps


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


def make_eval_step(model: Model) -> EvalStep:
    """Return eval_step(state, batch) -> Metrics, by the running statistics."""

    def eval_step(state: TrainState, batch: Batch) -> Metrics:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits: Any = model.apply(variables, batch.images, train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return compute_metrics(logits, losses, batch.labels, batch.mask)

    return eval_step


def make_add_evaluation(eval_step: EvalStep, take_batch: TakeBatch) -> AddEvaluation:
    """Return add(total, state, split, number) -> the Metrics `total` and those of batch `number` of the split."""

    def add(total: Metrics, state: TrainState, split: DeviceSplit, number: jax.Array) -> Metrics:
        return total + eval_step(state, take_batch(split, number))

    return add


def _zeros(abstract: Any, *leading: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros((*leading, *leaf.shape), leaf.dtype), abstract)
