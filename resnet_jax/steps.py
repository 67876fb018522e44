"""Training and evaluation as pure functions to be jitted: of one batch, and many in one dispatch to the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from chex import ArrayTree
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike

from resnet_jax.config import Precision
from resnet_jax.data.resident import DeviceSplit, Orders, Sampler
from resnet_jax.data.types import Batch
from resnet_jax.gradients import (
    Computed,
    ComputeGradients,
    accumulate,
    compute_gradients,
    cross_entropy,
    on_each_device,
)
from resnet_jax.metrics import Metrics, StepMetrics, StepsReport, compute_metrics
from resnet_jax.models import Model
from resnet_jax.models.precision import full_float32
from resnet_jax.optim import current_learning_rate
from resnet_jax.vectors import Layout


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


@dataclasses.dataclass(frozen=True, eq=False)  # each by itself, so that it may be jitted
class TrainStep:
    """One step of SGD: a pure function (state, batch) -> (state, StepMetrics), of trees or of vectors of parameters.

    Attributes:
      compute: the gradients; of the images of a device if there is a mesh.
      optimizer: see optim.sgd().
      schedule: the optimizer's; only for the report.
      dropout_key: random key, from which that of each step is derived.
      mesh: devices that compute gradients by themselves; see on_each_device().
    """

    compute: ComputeGradients
    optimizer: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    dropout_key: jax.Array
    mesh: Mesh | AbstractMesh | None = None

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """Make the step on a batch that is normalized and augmented."""
        compute = self.compute if self.mesh is None else on_each_device(self.compute, self.mesh)
        key = jax.random.fold_in(self.dropout_key, state.step)
        grads, metrics, batch_stats = compute(state.params, state.batch_stats, batch, key)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params, error=metrics.batch_error)
        params = optax.apply_updates(state.params, updates)
        report = StepMetrics(
            metrics=metrics,
            learning_rate=current_learning_rate(self.schedule, state.step, opt_state),
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


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    dropout_key: jax.Array,
    *,
    label_smoothing: float = 0.0,
    class_weights: ArrayLike | None = None,
    accumulation_steps: int = 1,
    precision: Precision = "default",
    mesh: Mesh | AbstractMesh | None = None,
) -> TrainStep:
    """Build the step of a network.

    Args:
      model, optimizer, schedule, dropout_key, mesh: see TrainStep.
      label_smoothing: share of the target probability that is spread over all classes; the loss in the report is the
        one that is minimized.
      class_weights: [num_classes], by which the losses of images are multiplied; likewise.
      accumulation_steps: parts that the batch is computed in; see accumulate(). Without BN groups (None) each part has
        statistics of its own.
      precision: of convolutions and matrix products, forward and backward; see OptimConfig.
    """
    compute: ComputeGradients = partial(
        compute_gradients,
        model=model,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        precision=precision,
    )
    if accumulation_steps > 1:
        compute = accumulate(compute, accumulation_steps, model.bn_group_size or 1)
    return TrainStep(compute, optimizer, schedule, dropout_key, mesh)


TrainSteps = Callable[[TrainState, DeviceSplit, Orders, jax.Array], tuple[TrainState, StepsReport]]


def make_train_steps(
    step: TrainStep, sampler: Sampler, *, counted: bool = False, as_vectors: bool = True
) -> TrainSteps:
    """Return train_steps(state, split, orders, count) -> (state, StepsReport): `count` steps as one loop on the device.

    The count is an argument of the compiled program: one program makes any number of steps, up to
    sampler.most_steps, and k steps leave the same bits as k times one. After a step whose loss or gradient is not
    finite the state stays as it is. All of it follows from state.step: nothing else says where the run stands.

    Args:
      step: one step.
      sampler: of the batches.
      counted: always compute sampler.most_steps steps, and keep those beyond `count` from changing anything. A loop
        whose length is known becomes one CUDA graph, and never waits for the host.
      as_vectors: carry parameters, statistics and the optimizer's state as vectors from step to step; only for an
        optimizer that treats each element by itself.
    """

    def train_steps(
        state: TrainState, split: DeviceSplit, orders: Orders, count: jax.Array
    ) -> tuple[TrainState, StepsReport]:
        pack, unpack, next_step = _in_vectors(step, state) if as_vectors else (_same, _same, step)
        first_step = state.step
        state = pack(state)

        def make_step(state: TrainState) -> tuple[TrainState, StepMetrics]:
            return next_step(state, sampler.sample(split, state.step, orders))

        def body(i: jax.Array, carry: tuple[TrainState, jax.Array, jax.Array]) -> Any:
            state, history, finite = carry
            goes_on = finite & (i < count)
            after, last = make_step(state)
            state = jax.tree.map(partial(jnp.where, goes_on), after, state)
            entry = jnp.where(goes_on, jnp.stack(jax.tree.leaves(last)), 0)
            return state, history.at[i].set(entry), finite & last.finite

        fields, structure = jax.tree.flatten(jax.eval_shape(make_step, state)[1])
        history = jnp.zeros((sampler.most_steps, len(fields)))  # [steps, fields]
        length = sampler.most_steps if counted else jnp.minimum(count, sampler.most_steps)
        state, history, _ = jax.lax.fori_loop(0, length, body, (state, history, jnp.bool(True)))
        report = StepsReport(state.step - first_step, jax.tree.unflatten(structure, history.T))
        return unpack(state), report

    return train_steps


def _same(state: TrainState) -> TrainState:
    return state


def _in_vectors(step: TrainStep, state: TrainState) -> tuple[Any, Any, TrainStep]:
    """Return what packs and unpacks states like `state`, and the step of packed ones."""
    of_params, of_stats = Layout(state.params), Layout(state.batch_stats)

    def pack(state: TrainState) -> TrainState:
        params, batch_stats = of_params.pack(state.params), of_stats.pack(state.batch_stats)
        return TrainState(state.step, params, batch_stats, of_params.pack_within(state.opt_state))

    def unpack(state: TrainState) -> TrainState:
        params, batch_stats = of_params.unpack(state.params), of_stats.unpack(state.batch_stats)
        return TrainState(state.step, params, batch_stats, of_params.unpack_within(state.opt_state))

    def compute(params: Any, batch_stats: Any, batch: Batch, dropout_key: jax.Array) -> Computed:
        computed = step.compute(of_params.unpack(params), of_stats.unpack(batch_stats), batch, dropout_key)
        return Computed(of_params.pack(computed.grads), computed.metrics, of_stats.pack(computed.batch_stats))

    return pack, unpack, dataclasses.replace(step, compute=compute)


def make_streamed_step(
    step: TrainStep, to_batch: Callable[[Any, jax.Array], Any]
) -> Callable[[TrainState, Any], tuple[TrainState, StepsReport]]:
    """Return streamed_step(state, host_batch) -> (state, StepsReport): one step on images that were read for it.

    Args:
      step: the training step.
      to_batch: to_batch(host_batch, step), inside the jitted function.
    """

    def streamed_step(state: TrainState, host_batch: Any) -> tuple[TrainState, StepsReport]:
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
