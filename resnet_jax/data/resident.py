"""A data set that lives on the devices; each of its batches is a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from resnet_jax.config import DataConfig
from resnet_jax.data.augment import normalize, random_crop, random_flip
from resnet_jax.data.types import Batch, Dataset, Preprocessing
from resnet_jax.parallel.devices import round_up

DeviceSplit = tuple[jax.Array, jax.Array]  # images [N, H, W, C] uint8, labels [N] int32


class Orders(NamedTuple):
    """The order of the images in the epochs that some steps draw from.

    Attributes:
      first_epoch: int32 scalar.
      permutations: [epochs, num_images] int32, from first_epoch on.
    """

    first_epoch: jax.Array
    permutations: jax.Array


class Sampler(NamedTuple):
    """Batches for training.

    Attributes:
      prepare: prepare(step, count) -> Orders for the steps step, ..., step + count - 1: the sorting, which takes
        as long as many small steps, done once for all of them.
      sample: sample(split, step, orders) -> Batch of one of these steps.
      most_steps: the largest count.
    """

    prepare: Callable[[jax.Array, jax.Array], Orders]
    sample: Callable[[DeviceSplit, jax.Array, Orders], Batch]
    most_steps: int


TakeBatch = Callable[[DeviceSplit, jax.Array], Batch]


def epoch_orders(
    key: jax.Array, step: jax.Array, count: jax.Array, *, batch_size: int, num_images: int, most_steps: int
) -> Orders:
    """Shuffle the epochs that the steps step, ..., step + count - 1 draw from; count is at most most_steps.

    Raises:
      ValueError: the batch is larger than the data set.
    """
    if batch_size > num_images:
        raise ValueError(f"a batch of {batch_size} is larger than the data set of {num_images} images")
    most_epochs = max(most_steps * batch_size - 2, 0) // num_images + 2
    first = step * batch_size // num_images
    last = ((step + count) * batch_size - 1) // num_images

    def shuffle(i: jax.Array, permutations: jax.Array) -> jax.Array:
        order = jax.random.permutation(jax.random.fold_in(key, first + i), num_images)
        return permutations.at[i].set(order)

    permutations = jnp.zeros((most_epochs, num_images), jnp.int32)
    return Orders(first, jax.lax.fori_loop(0, last - first + 1, shuffle, permutations))


def batch_indices(orders: Orders, step: jax.Array, *, batch_size: int) -> jax.Array:
    """Return which images make up the batch of `step`: [batch_size] int32.

    The epochs form one endless stream, each a permutation of its own, cut into batches: every image comes
    exactly once an epoch, no remainder is dropped, and a batch may straddle two epochs.
    """
    num_images = orders.permutations.shape[1]
    positions = step * batch_size + jnp.arange(batch_size)
    return orders.permutations[positions // num_images - orders.first_epoch, positions % num_images]


def make_sampler(
    key: jax.Array,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    num_images: int,
    padding: int,
    flip: bool,
    most_steps: int = 1,
    sharding: jax.sharding.Sharding | None = None,
) -> Sampler:
    """Return a Sampler of shuffled, normalized and augmented batches, to be called inside a jitted function.

    Args:
      key: random key of the run.
      preprocessing: mean and std.
      batch_size: images in a batch.
      num_images: size of the split.
      padding: of the random crop, in pixels; 0 for no crop.
      flip: whether images are mirrored at random.
      most_steps: for how many steps the order is prepared at a time, at most.
      sharding: of the batch over devices.
    """
    order_key, augment_key = jax.random.split(key)
    prepare = partial(epoch_orders, order_key, batch_size=batch_size, num_images=num_images, most_steps=most_steps)

    def sample(split: DeviceSplit, step: jax.Array, orders: Orders) -> Batch:
        indices = batch_indices(orders, step, batch_size=batch_size)
        crop_key, flip_key = jax.random.split(jax.random.fold_in(augment_key, step))
        images, labels = split[0][indices], split[1][indices]
        if sharding is not None:
            images, labels = jax.lax.with_sharding_constraint((images, labels), sharding)
        images = normalize(images, preprocessing.mean, preprocessing.std)
        if padding:
            images = random_crop(crop_key, images, padding=padding)
        if flip:
            images = random_flip(flip_key, images)
        return Batch(images, labels, jnp.ones(batch_size, bool))

    return Sampler(prepare, sample, most_steps)


def make_take_batch(
    preprocessing: Preprocessing, *, batch_size: int, sharding: jax.sharding.Sharding | None = None
) -> TakeBatch:
    """Return take_batch(split, number): the images number * batch_size, ... in order, for evaluation.

    The last batch is filled up with images whose mask is False, so that every image counts exactly once.
    """

    def take_batch(split: DeviceSplit, number: jax.Array) -> Batch:
        positions = number * batch_size + jnp.arange(batch_size)
        indices = jnp.minimum(positions, len(split[1]) - 1)
        images, labels = split[0][indices], split[1][indices]
        if sharding is not None:
            images, labels = jax.lax.with_sharding_constraint((images, labels), sharding)
        return Batch(normalize(images, preprocessing.mean, preprocessing.std), labels, positions < len(split[1]))

    return take_batch


class ResidentData:
    """A data set whose images lie on every device: order, augmentation and many steps are one dispatch; TrainingData.

    Attributes:
      sampler: batches for training.
    """

    streamed = False

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        preprocessing: Preprocessing,
        key: jax.Array,
        *,
        most_steps: int,
        replicated: jax.sharding.Sharding,
        by_image: jax.sharding.Sharding,
    ):
        """Take a data set; splits are copied to the devices when they are first needed.

        Args:
          dataset: in memory.
          config: of the batches and the augmentation.
          preprocessing: mean and std.
          key: random key of order and augmentation.
          most_steps: the most steps in one dispatch.
          replicated: how splits lie on the devices.
          by_image: how batches do.
        """
        splits = {"train": dataset.train, "test": dataset.test, "validation": dataset.validation}
        self._splits = {name: split for name, split in splits.items() if split is not None}
        self._on_devices: dict[str, DeviceSplit] = {}
        self._replicated = replicated
        self.train_images = len(dataset.train)
        self.held_out = tuple(name for name in self._splits if name != "train")
        self.most_steps = most_steps
        self.sampler = make_sampler(
            key,
            preprocessing,
            batch_size=config.batch_size,
            num_images=self.train_images,
            padding=config.padding,
            flip=config.flip,
            most_steps=most_steps,
            sharding=by_image,
        )
        self._eval_batch_size = round_up(config.eval_batch_size)
        self._take_batch = make_take_batch(preprocessing, batch_size=self._eval_batch_size, sharding=by_image)

    def begin(self, step: int) -> tuple[DeviceSplit, jax.Array]:
        del step  # which the state holds
        return self.train_arrays(0)

    def train_arrays(self, count: int) -> tuple[DeviceSplit, jax.Array]:
        return self._put("train"), jnp.int32(count)

    def eval_arrays(self, split: str) -> Generator[tuple[DeviceSplit, jax.Array], None, None]:
        on_devices = self._put(split)
        for number in range(-(-len(on_devices[1]) // self._eval_batch_size)):
            yield on_devices, jnp.int32(number)

    def to_eval_batch(self, arrays: tuple[DeviceSplit, jax.Array]) -> Batch:
        return self._take_batch(*arrays)

    def unreadable(self) -> list[str]:
        return []

    def close(self) -> None:
        pass

    def _put(self, name: str) -> DeviceSplit:
        if name not in self._on_devices:
            split = self._splits[name]
            self._on_devices[name] = jax.device_put((split.images, split.labels), self._replicated)
        return self._on_devices[name]
