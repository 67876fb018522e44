"""What trains and tests a classifier: network, optimizer and data, and the jitted programs that run them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.config import Config, RunConfig
from resnet_jax.data.inputs import balanced_weights
from resnet_jax.data.resident import ResidentData
from resnet_jax.data.streamed import StreamedData
from resnet_jax.data.types import AnyDataset, Dataset, Inputs, TrainingData
from resnet_jax.errors import UserError
from resnet_jax.metrics import Metrics, StepsReport
from resnet_jax.models import Model, build_model, check_bn_groups, freeze_all_but
from resnet_jax.models.backend import for_this_backend
from resnet_jax.models.stacking import init_variables
from resnet_jax.optim import build_optimizer, build_schedule, treats_all_alike
from resnet_jax.parallel.devices import compiler_options, counts_steps, make_shardings
from resnet_jax.parallel.memory import check_memory, explained, training_remedies
from resnet_jax.steps import (
    TrainState,
    create_train_state,
    eval_step,
    make_streamed_step,
    make_train_step,
    make_train_steps,
)

_COUNTED_STEPS = 20  # in a dispatch to an accelerator: enough to keep it busy while the host reads their report


class Trainer:
    """Network, optimizer and data of a configuration, and the jitted programs that run them on all devices.

    Attributes:
      config: the configuration.
      inputs: what the network takes and gives.
      model: the network.
      train_step: (state, batch) -> (state, StepMetrics); pure, to be jitted.
      eval_step: (state, batch) -> Metrics; pure, to be jitted.
      data: batches of the data set.
      replicated: how the state lies on the devices: whole on each.
      by_image: how batches do: divided along their first axis.
      train_program: the jitted training steps; compiled after begin().
    """

    def __init__(self, config: Config, inputs: Inputs, dataset: AnyDataset):
        """Build everything; nothing is computed or read yet.

        Raises:
          UserError: a value that does not fit the network, the devices or the images.
        """
        devices = jax.device_count()
        if config.data.batch_size % devices:
            raise UserError(
                f"--data.batch-size {config.data.batch_size} does not divide over {devices} devices: choose a multiple"
                f" of {devices}"
            )
        self.config, self.inputs = config, inputs
        model = freeze_all_but(build_model(config.model, len(inputs.class_names)), config.optim.trainable)
        part, group = config.data.batch_size // config.optim.accumulation_steps, model.bn_group_size
        by_themselves = devices > 1 and group is not None and part % (group * devices) == 0  # no group is of two
        self.model: Model = for_this_backend(model, parts=1 if by_themselves else None)
        check_bn_groups(self.model, inputs.image_shape, part)
        schedule = build_schedule(config.optim, config.run.steps)
        self._optimizer = build_optimizer(config.optim, schedule, self.model.trainable)
        key = jax.random.key(config.run.seed)
        self._init_key, data_key = jax.random.split(key)
        self.replicated, self.by_image = make_shardings()
        self.train_step = make_train_step(
            self.model,
            self._optimizer,
            schedule,
            jax.random.fold_in(key, 2),
            label_smoothing=config.optim.label_smoothing,
            class_weights=balanced_weights(dataset) if config.optim.class_weights == "balanced" else None,
            accumulation_steps=config.optim.accumulation_steps,
            precision=config.optim.precision,
            mesh=self.by_image.mesh if by_themselves else None,
        )
        self.eval_step = partial(eval_step, model=self.model)
        self.data: TrainingData
        steps: Callable[..., tuple[TrainState, StepsReport]]
        if isinstance(dataset, Dataset):
            resident = self.data = ResidentData(
                dataset,
                config.data,
                inputs.preprocessing,
                data_key,
                most_steps=_most_steps(config.run),
                replicated=self.replicated,
                by_image=self.by_image,
            )
            alike = treats_all_alike(config.optim) and not config.model.frozen_bn
            steps = make_train_steps(self.train_step, resident.sampler, counted=counts_steps(), as_vectors=alike)
        else:
            streamed = self.data = StreamedData(
                dataset, config.data, inputs, data_key, seed=config.run.seed, by_image=self.by_image
            )
            steps = make_streamed_step(self.train_step, streamed.to_train_batch)
        self.train_program: Any = jax.jit(
            steps, donate_argnums=0, out_shardings=self.replicated, compiler_options=compiler_options()
        )

        def add_evaluation(total: Metrics, state: TrainState, arrays: Any) -> Metrics:
            return total + self.eval_step(state, self.data.to_eval_batch(arrays))

        self._add_evaluation = jax.jit(add_evaluation, out_shardings=self.replicated)

    def initial_state(self) -> TrainState:
        """Initialize parameters and optimizer on the devices."""
        variables = init_variables(self.model, self._init_key, self.inputs.image_shape)
        create = partial(create_train_state, self._optimizer)
        return jax.jit(create, out_shardings=self.replicated)(variables)

    def abstract_state(self) -> TrainState:
        """Return the shapes, dtypes and shardings of the state, for restoring a checkpoint."""

        def create(key: jax.Array) -> TrainState:
            images = jnp.zeros((1, *self.inputs.image_shape))
            return create_train_state(self._optimizer, self.model.init(key, images, train=False))

        shapes = jax.eval_shape(create, jax.random.key(0))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.replicated), shapes)

    def begin(self, state: TrainState) -> None:
        """Compile what train() needs, and go to the images of the next step of `state`."""
        self.train_program = self.train_program.lower(state, *self.data.begin(int(state.step))).compile()
        check_memory(self.train_program, "a training step", training_remedies(self.config))

    def train(self, state: TrainState, count: int) -> tuple[TrainState, StepsReport]:
        """Make the next `count` steps after begin() in one dispatch, data.most_steps at most, without waiting for them.

        The buffers of `state` are used up.
        """
        return self.train_program(state, *self.data.train_arrays(count))

    def evaluate(self, state: TrainState, split: str, stop: Callable[[], object] = lambda: False) -> Metrics | None:
        """Evaluate every image of a held-out split once, single view; sums by class as NumPy arrays.

        It is given up, and None returned, if stop() becomes true, which is asked before each batch.
        """
        total = jax.device_put(Metrics.zeros(len(self.inputs.class_names)), self.replicated)
        remedies = [f"--data.eval-batch-size below {self.config.data.eval_batch_size}"]
        with contextlib.closing(self.data.eval_arrays(split)) as batches, explained("an evaluation", remedies):
            for arrays in batches:
                if stop():
                    return None
                before, total = total, self._add_evaluation(total, state, arrays)
                jax.block_until_ready(before)  # so that a signal acts soon, and few batches wait for a slow device
        return jax.device_get(total)


def _most_steps(config: RunConfig) -> int:
    """Return for how many steps in a dispatch the program is made.

    A counted loop makes all of them even where something is due sooner, so it is short, and several fill the interval
    between log records.
    """
    if config.steps_per_dispatch or not counts_steps():
        return min(config.steps_per_dispatch or config.log_every, config.log_every)
    dispatches = -(-config.log_every // _COUNTED_STEPS)
    return -(-config.log_every // dispatches)
