"""The training step and the evaluation step: pure functions to be jitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import optax

from resnet_jax.data.pipeline import DeviceSplit, SampleBatch
from resnet_jax.metrics import Metrics, compute_metrics
from resnet_jax.models import Model
from resnet_jax.optim import current_learning_rate
from resnet_jax.train_state import TrainState


@flax.struct.dataclass
class StepMetrics:
    """What one training step reports.

    Attributes:
      metrics: sums over the batch, in training mode, before the update.
      learning_rate: of the update; float32 scalar.
      gradient_norm: L2 norm of the gradient of the loss, without weight decay; float32 scalar.
    """

    metrics: Metrics
    learning_rate: jax.Array
    gradient_norm: jax.Array


TrainStep = Callable[[TrainState, DeviceSplit], tuple[TrainState, StepMetrics]]
EvalStep = Callable[[TrainState, DeviceSplit, jax.Array], Metrics]


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    sample_batch: SampleBatch,
    dropout_key: jax.Array,
) -> TrainStep:
    """Return train_step(state, split) -> (state, StepMetrics); batch and dropout follow from state.step alone."""

    def train_step(state: TrainState, split: DeviceSplit) -> tuple[TrainState, StepMetrics]:
        batch = sample_batch(split, state.step)

        def mean_loss(params: Any) -> Any:
            variables = {"params": params, "batch_stats": state.batch_stats}
            rngs = {"dropout": jax.random.fold_in(dropout_key, state.step)}
            logits, updates = model.apply(variables, batch.images, train=True, mutable=["batch_stats"], rngs=rngs)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            return losses.mean(), (logits, losses, updates.get("batch_stats", {}))  # VGG has none

        grads, (logits, losses, batch_stats) = jax.grad(mean_loss, has_aux=True)(state.params)
        metrics = compute_metrics(logits, losses, batch.labels, batch.mask)
        error = 100 * metrics.errors.sum() / metrics.count.sum()
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, error=error)
        report = StepMetrics(
            metrics=metrics,
            learning_rate=current_learning_rate(schedule, state.step, opt_state),
            gradient_norm=optax.tree.norm(grads),
        )
        state = TrainState(state.step + 1, optax.apply_updates(state.params, updates), batch_stats, opt_state)
        return state, report

    return train_step


def make_eval_step(model: Model, take_batch: SampleBatch) -> EvalStep:
    """Return eval_step(state, split, number) -> Metrics of batch `number`, by the running statistics."""

    def eval_step(state: TrainState, split: DeviceSplit, number: jax.Array) -> Metrics:
        batch = take_batch(split, number)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits: Any = model.apply(variables, batch.images, train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return compute_metrics(logits, losses, batch.labels, batch.mask)

    return eval_step
