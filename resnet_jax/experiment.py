"""Put a configuration's pieces together: data on the devices, model, optimizer, steps."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from resnet_jax.config import Config, OptimConfig
from resnet_jax.data import Dataset, Split, load_dataset, split_validation
from resnet_jax.data.pipeline import (
    DeviceSplit,
    Preprocessing,
    make_sample_batch,
    make_take_batch,
    per_pixel_mean,
)
from resnet_jax.errors import UserError
from resnet_jax.metrics import Metrics
from resnet_jax.models import ResNet, cifar_resnet
from resnet_jax.optim import sgd, step_schedule, warm_up_until_error
from resnet_jax.steps import make_eval_step, make_train_step
from resnet_jax.train_state import TrainState, create_train_state


def build_model(config: Config, num_classes: int) -> ResNet:
    """Build the configured network.

    Raises:
      UserError: the depth is not 6n+2.
    """
    fields = dataclasses.asdict(config.model)
    depth, dtype = fields.pop("depth"), jnp.dtype(fields.pop("dtype"))
    try:
        return cifar_resnet(depth, num_classes=num_classes, dtype=dtype, **fields)
    except ValueError as error:
        raise UserError(f"--model.depth: {error}") from error


def build_optimizer(config: OptimConfig) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """Build SGD and its schedule.

    Raises:
      UserError: boundaries that do not increase.
    """
    by_steps = config.warmup == "steps"
    try:
        schedule = step_schedule(
            config.learning_rate,
            config.boundaries,
            warmup_learning_rate=config.warmup_learning_rate,
            warmup_steps=config.warmup_steps if by_steps else 0,
        )
    except ValueError as error:
        raise UserError(f"--optim.boundaries: {error}") from error
    warm_up = None
    if config.warmup == "error":
        warm_up = warm_up_until_error(config.warmup_error, config.warmup_learning_rate / config.learning_rate)
    optimizer = sgd(
        schedule,
        momentum=config.momentum,
        momentum_style=config.momentum_style,
        weight_decay=config.weight_decay,
        weight_decay_on=config.weight_decay_on,
        warm_up=warm_up,
    )
    return optimizer, schedule


def load_data(config: Config) -> Dataset:
    """Load the configured data set and split off the validation images.

    Raises:
      UserError: the data set is not there or damaged, or smaller than a batch.
    """
    data = config.data
    dataset = load_dataset(data.name, data.dir)
    if data.validation_size:
        dataset = split_validation(dataset, data.validation_size, data.split_seed)
    if data.batch_size > len(dataset.train):
        raise UserError(
            f"a batch of {data.batch_size} is larger than the {len(dataset.train)} training images of"
            f" {dataset.name}: choose a smaller --data.batch-size"
        )
    return dataset


def build_preprocessing(config: Config, dataset: Dataset) -> Preprocessing:
    """Take the given channel statistics, or the mean image of the training split."""
    given = config.data.mean
    mean = per_pixel_mean(dataset.train) if given is None else np.asarray(given, np.float32)
    return Preprocessing(mean, np.asarray(config.data.std, np.float32))


class Experiment:
    """Model, optimizer and jitted steps of a configuration, on a mesh of all devices.

    Attributes:
      model, optimizer, schedule: see build_model and build_optimizer.
      replicated: sharding of the state and of the data set, which every device holds whole.
      train_step: (state, split) -> (state, StepMetrics); donates the state.
    """

    def __init__(self, config: Config, dataset: Dataset, preprocessing: Preprocessing):
        """Build everything; nothing is computed yet.

        Raises:
          UserError: a value that does not fit the data or the devices.
        """
        self._config = config
        self._image_shape = dataset.image_shape
        devices = jax.device_count()
        for name in ("batch_size", "eval_batch_size"):
            if getattr(config.data, name) % devices:
                raise UserError(
                    f"--data.{name.replace('_', '-')} {getattr(config.data, name)} does not divide over"
                    f" {devices} devices: choose a multiple of {devices}"
                )
        mesh = jax.make_mesh((devices,), ("batch",), axis_types=(AxisType.Auto,))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        by_image = NamedSharding(mesh, PartitionSpec("batch"))
        self.model = build_model(config, dataset.num_classes)
        self.optimizer, self.schedule = build_optimizer(config.optim)
        self._init_key, data_key = jax.random.split(jax.random.key(config.run.seed))
        sample_batch = make_sample_batch(
            data_key,
            preprocessing,
            batch_size=config.data.batch_size,
            num_images=len(dataset.train),
            padding=config.data.padding,
            flip=config.data.flip,
            sharding=by_image,
        )
        take_batch = make_take_batch(preprocessing, batch_size=config.data.eval_batch_size, sharding=by_image)
        self.train_step = jax.jit(
            make_train_step(self.model, self.optimizer, self.schedule, sample_batch),
            donate_argnums=0,
            out_shardings=self.replicated,
        )
        self._eval_step = jax.jit(make_eval_step(self.model, take_batch), out_shardings=self.replicated)

    def put(self, split: Split) -> DeviceSplit:
        """Copy a split to every device."""
        return jax.device_put((split.images, split.labels), self.replicated)

    def initial_state(self) -> TrainState:
        """Initialize parameters and optimizer on the devices."""
        return jax.jit(self._create, out_shardings=self.replicated)(self._init_key)

    def abstract_state(self) -> TrainState:
        """Return the shapes, dtypes and shardings of the state, for restoring a checkpoint."""
        shapes = jax.eval_shape(self._create, self._init_key)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.replicated), shapes)

    def _create(self, key: jax.Array) -> TrainState:
        return create_train_state(self.model, self.optimizer, key, self._image_shape)

    def evaluate(self, state: TrainState, split: DeviceSplit) -> Metrics:
        """Evaluate every image of a split once, single view; sums by class as NumPy arrays."""
        batches = -(-len(split[1]) // self._config.data.eval_batch_size)
        parts = [self._eval_step(state, split, jnp.int32(number)) for number in range(batches)]
        total = jax.device_get(parts[0])
        for part in parts[1:]:
            total = total + jax.device_get(part)
        return total
