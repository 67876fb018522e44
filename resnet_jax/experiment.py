"""Put a configuration's pieces together: data, model, optimizer, steps."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from resnet_jax.config import Config, ModelConfig, OptimConfig
from resnet_jax.data import Dataset, load_dataset, split_validation
from resnet_jax.data.encoded import AnyDataset, StreamedDataset, split_streamed_validation
from resnet_jax.data.pipeline import Preprocessing, adapt_preprocessing, per_pixel_mean
from resnet_jax.data.statistics import load_statistics
from resnet_jax.errors import UserError
from resnet_jax.models import VGG, Model, ResNet, build, cpu_conv
from resnet_jax.models.stacking import init_variables
from resnet_jax.optim import cosine_schedule, reduce_on_plateau, sgd, step_schedule, warm_up_until_error
from resnet_jax.steps import make_eval_step, make_train_step
from resnet_jax.train_state import TrainState, create_train_state
from resnet_jax.workdir import Inputs, check_inputs

_MOST_IMAGES = 2**31  # positions in the endless stream of images are int32 on the devices


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
    # By process, so that each reads consecutive images: jax.make_mesh orders TPUs by where they are.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.array(devices), ("batch",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))


def build_optimizer(config: OptimConfig, steps: int) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """Build SGD and its schedule for so many training steps.

    Raises:
      UserError: boundaries that do not increase, or a warm-up that leaves no step for the cosine.
    """
    rate = config.learning_rate
    warm_up = {
        "steps": optax.constant_schedule(config.warmup_learning_rate),
        "linear": optax.linear_schedule(0.0, rate, config.warmup_steps),
    }.get(config.warmup)
    warmup_steps = config.warmup_steps if warm_up else 0
    try:
        if config.schedule == "cosine":
            schedule = cosine_schedule(rate, steps, warm_up=warm_up, warmup_steps=warmup_steps)
        else:
            boundaries = config.boundaries if config.schedule == "steps" else ()
            schedule = step_schedule(rate, boundaries, warm_up=warm_up, warmup_steps=warmup_steps)
    except ValueError as error:
        option = "--optim.warmup-steps" if config.schedule == "cosine" else "--optim.boundaries"
        raise UserError(f"{option}: {error}") from error
    factors = []
    if config.warmup == "error":
        factors.append(warm_up_until_error(config.warmup_error, config.warmup_learning_rate / rate))
    if config.schedule == "plateau":
        factors.append(reduce_on_plateau(config.plateau_patience))
    optimizer = sgd(
        schedule,
        momentum=config.momentum,
        momentum_style=config.momentum_style,
        weight_decay=config.weight_decay,
        weight_decay_on=config.weight_decay_on,
        factors=factors,
    )
    return optimizer, schedule


def load_data(config: Config) -> AnyDataset:
    """Load the configured data set and split off the validation images.

    Raises:
      UserError: the data set is not there or damaged, smaller than a batch, or passed through too often.
    """
    data = config.data
    dataset = load_dataset(data.name, data.dir)
    if data.validation_size:
        split: Any = split_streamed_validation if isinstance(dataset, StreamedDataset) else split_validation
        dataset = split(dataset, data.validation_size, data.split_seed)
    if data.batch_size > len(dataset.train):
        raise UserError(
            f"a batch of {data.batch_size} is larger than the {len(dataset.train)} training images of"
            f" {dataset.name}: choose a smaller --data.batch-size"
        )
    images = config.run.steps * data.batch_size
    if isinstance(dataset, Dataset) and images >= _MOST_IMAGES:
        raise UserError(
            f"--run.steps {config.run.steps} of {data.batch_size} images are {images:,}, beyond the {_MOST_IMAGES:,}"
            " that a position in a data set kept on the devices can count"
        )
    return dataset


def describe_inputs(config: Config, dataset: AnyDataset, trained: Preprocessing | None = None) -> Inputs:
    """Put together what the network takes and gives.

    Args:
      config: of the run.
      dataset: of the run.
      trained: preprocessing that belongs to weights which the run begins with; None for the given channel statistics,
        or the mean image of the training images.

    Raises:
      UserError: the statistics of streamed images are needed and not there, they or others are not finite, or an option
        is not for this data.
    """
    data, statistics, mean_image = config.data, None, None
    mean_is_known = trained is not None or data.mean is not None
    if isinstance(dataset, StreamedDataset):
        shape = (data.image_size, data.image_size, 3)
        if data.lighting or not mean_is_known:
            statistics = load_statistics(dataset, data.dir)
            mean_image = statistics.mean
    else:
        if data.lighting:
            raise UserError(f"--data.lighting is for streamed images; those of {dataset.name} are all of one size")
        shape = dataset.image_shape
        mean_image = None if mean_is_known else per_pixel_mean(dataset.train)
    if trained is None:
        mean = mean_image if data.mean is None else data.mean
        trained = Preprocessing(np.asarray(mean, np.float32), np.asarray(data.std, np.float32))
    lighting = data.lighting * statistics.lighting if statistics and data.lighting else None
    inputs = Inputs(shape, dataset.class_names, adapt_preprocessing(trained, shape), lighting)
    check_inputs(inputs)
    return inputs


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


def _check_bn_groups(model: ResNet, config: Config, image_shape: tuple[int, int, int]) -> None:
    """Raise UserError if a BN group has a single value in the smallest map, which has no variance to divide by."""
    stride = max(model.feature_strides.values())
    height, width = (-(-side // stride) for side in image_shape[:2])
    group = model.bn_group_size or config.data.batch_size // config.optim.accumulation_steps
    if group * height * width == 1:
        raise UserError(
            f"the last maps of images of {image_shape[0]}x{image_shape[1]} pixels are a single pixel, and BN needs more"
            " than one value: choose a larger --model.bn-group-size, --data.batch-size or image"
        )


class Experiment:
    """Network, optimizer and steps of a configuration, on a mesh of all devices.

    Attributes:
      config: the configuration.
      inputs: what the network takes and gives.
      model: the network.
      train_step: (state, batch) -> (state, StepMetrics); pure, to be jitted.
      eval_step: (state, batch) -> Metrics; pure, to be jitted.
      data_key: random key of order and augmentation.
      replicated: how the state lies on the devices: whole on each.
      by_image: how batches do: divided along their first axis.
    """

    def __init__(self, config: Config, inputs: Inputs):
        """Build everything; nothing is computed yet.

        Raises:
          UserError: a value that does not fit the devices or the images.
        """
        devices = jax.device_count()
        for name in ("batch_size", "eval_batch_size"):
            if getattr(config.data, name) % devices:
                raise UserError(
                    f"--data.{name.replace('_', '-')} {getattr(config.data, name)} does not divide over"
                    f" {devices} devices: choose a multiple of {devices}"
                )
        self.config, self.inputs = config, inputs
        self.model = for_this_backend(build_model(config.model, len(inputs.class_names)))
        if isinstance(self.model, ResNet) and not self.model.frozen_bn:
            _check_bn_groups(self.model, config, inputs.image_shape)
        self._optimizer, schedule = build_optimizer(config.optim, config.run.steps)
        key = jax.random.key(config.run.seed)
        self._init_key, self.data_key = jax.random.split(key)
        dropout_key = jax.random.fold_in(key, 2)
        self.replicated, self.by_image = make_shardings()
        self.train_step = make_train_step(
            self.model,
            self._optimizer,
            schedule,
            dropout_key,
            label_smoothing=config.optim.label_smoothing,
            accumulation_steps=config.optim.accumulation_steps,
        )
        self.eval_step = make_eval_step(self.model)

    def initial_state(self) -> TrainState:
        """Initialize parameters and optimizer on the devices."""
        variables = init_variables(self.model, self._init_key, self.inputs.image_shape)
        create = partial(create_train_state, self._optimizer)
        return jax.jit(create, out_shardings=self.replicated)(variables)

    def abstract_state(self) -> TrainState:
        """Return the shapes, dtypes and shardings of the state, for restoring a checkpoint."""
        return abstract_state(self.model, self._optimizer, self.inputs.image_shape, self.replicated)
