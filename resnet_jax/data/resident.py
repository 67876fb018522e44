"""A data set that lives on the devices; each of its batches is a pure function of (seed, step)."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.config import DataConfig
from resnet_jax.data.augment import normalize, random_crop, random_flip
from resnet_jax.data.types import Batch, Dataset, Preprocessing, TrainingData
from resnet_jax.parallel.devices import round_up

DeviceSplit = tuple[jax.Array, jax.Array]  # images [N, H, W, C] uint8, labels [N] int32


class Orders(NamedTuple):
    """The order of the images in the epochs that some steps draw from."""

    first_epoch: jax.Array  # int32 scalar
    permutations: jax.Array  # [epochs, num_images] int32, from first_epoch on


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Shuffled, normalized and augmented batches for training, to be made inside a jitted function.

    The epochs form one endless stream, each a permutation of its own, cut into batches: every image comes
    exactly once an epoch, no remainder is dropped, and a batch may straddle two epochs.

    Attributes:
      key: random key of order and augmentation.
      num_images: size of the split.
      padding: of the random crop, in pixels; 0 for no crop.
      flip: whether images are mirrored at random.
      most_steps: for how many steps the order is prepared at a time.
      sharding: of the batch over devices.
    """

    key: jax.Array
    preprocessing: Preprocessing
    batch_size: int
    num_images: int
    padding: int
    flip: bool
    most_steps: int = 1
    sharding: jax.sharding.Sharding | None = None

    def first_epoch(self, step: int) -> int:
        """Return the epoch that the batch of `step` begins in."""
        return step * self.batch_size // self.num_images

    def orders(self, first_epoch: jax.Array) -> Orders:
        """Shuffle the epochs that most_steps steps may draw from, if the first of them begins in `first_epoch`."""
        key, _ = jax.random.split(self.key)
        most_epochs = max(self.most_steps * self.batch_size - 2, 0) // self.num_images + 2

        def shuffle(i: jax.Array) -> jax.Array:
            return jax.random.permutation(jax.random.fold_in(key, first_epoch + i), self.num_images)

        return Orders(first_epoch, jax.lax.map(shuffle, jnp.arange(most_epochs)))

    def indices(self, step: jax.Array, orders: Orders) -> jax.Array:
        """Return which images make up the batch of `step`: [batch_size] int32."""
        positions = step * self.batch_size + jnp.arange(self.batch_size)
        return orders.permutations[positions // self.num_images - orders.first_epoch, positions % self.num_images]

    def sample(self, split: DeviceSplit, step: jax.Array, orders: Orders) -> Batch:
        """Return the batch of one of the steps that `orders` are prepared for."""
        _, key = jax.random.split(self.key)
        crop_key, flip_key = jax.random.split(jax.random.fold_in(key, step))
        images, labels = self.take(split, self.indices(step, orders))
        if self.padding:
            images = random_crop(crop_key, images, padding=self.padding)
        if self.flip:
            images = random_flip(flip_key, images)
        return Batch(images, labels, jnp.ones(self.batch_size, bool))

    def take(self, split: DeviceSplit, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return some of the images, normalized, and their labels."""
        images, labels = split[0][indices], split[1][indices]
        if self.sharding is not None:
            images, labels = jax.lax.with_sharding_constraint((images, labels), self.sharding)
        return normalize(images, *self.preprocessing), labels


class ResidentData(TrainingData):
    """A data set whose images lie on every device: order, augmentation and many steps are one dispatch.

    Attributes:
      sampler: batches for training.
    """

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
          dataset, config, preprocessing: of the run.
          key: random key of order and augmentation.
          most_steps: the most steps in one dispatch.
          replicated: how splits lie on the devices.
          by_image: how batches do.
        """
        super().__init__(dataset)
        self._on_devices: dict[str, DeviceSplit] = {}
        self._step = 0  # the next one
        self._orders: tuple[int, Orders] | None = None  # and the first epoch of them
        self._replicated = replicated
        self.most_steps = most_steps
        self.sampler = Sampler(
            key,
            preprocessing,
            batch_size=config.batch_size,
            num_images=self.train_images,
            padding=config.padding,
            flip=config.flip,
            most_steps=most_steps,
            sharding=by_image,
        )
        self._shuffle = jax.jit(self.sampler.orders)
        self._eval_batch_size = round_up(config.eval_batch_size)

    def begin(self, step: int) -> tuple[DeviceSplit, Orders, jax.Array]:
        self._step = step
        return self.train_arrays(0)

    def train_arrays(self, count: int) -> tuple[DeviceSplit, Orders, jax.Array]:
        orders = self._prepare(self.sampler.first_epoch(self._step))
        self._step += count
        return self._put("train"), orders, jnp.int32(count)

    def eval_arrays(self, split: str) -> Generator[tuple[DeviceSplit, jax.Array], None, None]:
        on_devices = self._put(split)
        for number in range(-(-len(on_devices[1]) // self._eval_batch_size)):
            yield on_devices, jnp.int32(number)

    def to_eval_batch(self, arrays: tuple[DeviceSplit, jax.Array]) -> Batch:
        """Take the images number * batch size, ...; the last batch is filled up with some whose mask is False."""
        split, number = arrays
        last = len(split[1]) - 1
        positions = number * self._eval_batch_size + jnp.arange(self._eval_batch_size)
        images, labels = self.sampler.take(split, jnp.minimum(positions, last))
        return Batch(images, labels, positions <= last)

    def _prepare(self, first_epoch: int) -> Orders:
        """Shuffle on the host: its CPU sorts while the devices train, and a TPU's sort takes a minute to compile."""
        if self._orders is None or self._orders[0] != first_epoch:
            with jax.default_device(_cpu()):
                orders = jax.device_get(self._shuffle(np.int32(first_epoch)))
            place = partial(jax.make_array_from_process_local_data, self._replicated)
            self._orders = first_epoch, jax.tree.map(place, orders)
        return self._orders[1]

    def _put(self, name: str) -> DeviceSplit:
        if name not in self._on_devices:
            split = self.splits[name]
            self._on_devices[name] = jax.device_put((split.images, split.labels), self._replicated)
        return self._on_devices[name]


def _cpu() -> jax.Device:
    """Return a CPU of this process, unless the user has set JAX_PLATFORMS to something without one."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]
