"""Put a configuration's pieces together: data on the devices, model, optimizer, steps."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from resnet_jax.config import Config, ModelConfig, OptimConfig
from resnet_jax.data import Dataset, Split, load_dataset, split_validation
from resnet_jax.data.pipeline import (
    DeviceSplit,
    Preprocessing,
    make_sampler,
    make_take_batch,
    per_pixel_mean,
)
from resnet_jax.errors import UserError
from resnet_jax.metrics import Metrics
from resnet_jax.models import VGG, Model, ResNet, build, cpu_conv
from resnet_jax.models.stacking import init_variables
from resnet_jax.optim import sgd, step_schedule, warm_up_until_error
from resnet_jax.steps import make_eval_step, make_eval_steps, make_train_step, make_train_steps
from resnet_jax.train_state import TrainState, create_train_state
from resnet_jax.workdir import Inputs


def build_model(config: ModelConfig, num_classes: int) -> Model:
    """Build the configured network.

    Raises:
      UserError: the family has no such depth.
    """
    fields = {field.name for field in dataclasses.fields(VGG if config.family == "vgg" else ResNet)}
    options = {name: value for name, value in dataclasses.asdict(config).items() if name in fields}
    options |= {"dtype": jnp.dtype(config.dtype), "num_classes": num_classes}
    try:
        return build(config.family, config.depth, **options)
    except ValueError as error:
        raise UserError(f"--model.depth: {error}") from error


def for_this_backend(model: Model) -> Model:
    """Give a network the convolution written for CPUs if it is to run on one, over all devices."""
    if jax.default_backend() != "cpu":
        return model
    return model.clone(conv_general_dilated=partial(cpu_conv.conv_general_dilated, parts=jax.device_count()))


def make_shardings() -> tuple[NamedSharding, NamedSharding]:
    """Return how arrays lie on all devices: whole on each, and divided along their first axis."""
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))


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


def describe_inputs(config: Config, dataset: Dataset) -> Inputs:
    """Take the given channel statistics, or the mean image of the training split."""
    given = config.data.mean
    mean = per_pixel_mean(dataset.train) if given is None else np.asarray(given, np.float32)
    preprocessing = Preprocessing(mean, np.asarray(config.data.std, np.float32))
    return Inputs(dataset.image_shape, dataset.class_names, preprocessing)


def abstract_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    sharding: jax.sharding.Sharding,
) -> TrainState:
    """Return the shapes and dtypes of a state and where to put it, for restoring a checkpoint."""

    def create(key: jax.Array) -> TrainState:
        return create_train_state(optimizer, model.init(key, jnp.zeros((1, *image_shape)), train=False))

    shapes = jax.eval_shape(create, jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


class Experiment:
    """Model, optimizer and jitted steps of a configuration, on a mesh of all devices.

    Attributes:
      model: the network.
      train_steps: (state, split, count) -> (state, StepsReport), `count` steps in one dispatch; donates the state.
      most_steps: the largest count.
    """

    def __init__(self, config: Config, inputs: Inputs, num_images: int):
        """Build everything for a training split of `num_images`; nothing is computed yet.

        Raises:
          UserError: a value that does not fit the data or the devices.
        """
        devices = jax.device_count()
        for name in ("batch_size", "eval_batch_size"):
            if getattr(config.data, name) % devices:
                raise UserError(
                    f"--data.{name.replace('_', '-')} {getattr(config.data, name)} does not divide over"
                    f" {devices} devices: choose a multiple of {devices}"
                )
        self.model = for_this_backend(build_model(config.model, len(inputs.class_names)))
        self._optimizer, schedule = build_optimizer(config.optim)
        self._image_shape = inputs.image_shape
        self.most_steps = config.run.steps_per_dispatch or config.run.log_every
        key = jax.random.key(config.run.seed)
        self._init_key, data_key = jax.random.split(key)
        dropout_key = jax.random.fold_in(key, 2)

        self._replicated, by_image = make_shardings()  # the state and the data set; batches
        sampler = make_sampler(
            data_key,
            inputs.preprocessing,
            batch_size=config.data.batch_size,
            num_images=num_images,
            padding=config.data.padding,
            flip=config.data.flip,
            most_steps=self.most_steps,
            sharding=by_image,
        )
        train_step = make_train_step(self.model, self._optimizer, schedule, dropout_key)
        self.train_steps = jax.jit(
            make_train_steps(train_step, sampler), donate_argnums=0, out_shardings=self._replicated
        )
        batch_size = config.data.eval_batch_size
        take_batch = make_take_batch(inputs.preprocessing, batch_size=batch_size, sharding=by_image)
        eval_steps = make_eval_steps(make_eval_step(self.model), take_batch, batch_size)
        self._eval_steps = jax.jit(eval_steps, out_shardings=self._replicated)

    def put(self, split: Split) -> DeviceSplit:
        """Copy a split to every device."""
        return jax.device_put((split.images, split.labels), self._replicated)

    def initial_state(self) -> TrainState:
        """Initialize parameters and optimizer on the devices."""
        variables = init_variables(self.model, self._init_key, self._image_shape)
        create = partial(create_train_state, self._optimizer)
        return jax.jit(create, out_shardings=self._replicated)(variables)

    def abstract_state(self) -> TrainState:
        """Return the shapes, dtypes and shardings of the state, for restoring a checkpoint."""
        return abstract_state(self.model, self._optimizer, self._image_shape, self._replicated)

    def evaluate(self, state: TrainState, split: DeviceSplit) -> Metrics:
        """Evaluate every image of a split once, single view, in one dispatch; sums by class as NumPy arrays."""
        return jax.device_get(self._eval_steps(state, split))
