"""Batches of a data set that lives on the device; each is a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.data.augment import normalize, random_crop, random_flip
from resnet_jax.data.dataset import Split


class Batch(NamedTuple):
    """Images [N, H, W, C] and labels [N] int32; `mask` [N] is False for padding that must not count."""

    images: jax.Array
    labels: jax.Array
    mask: jax.Array


class Preprocessing(NamedTuple):
    """What normalize() needs, in units of [0, 1]: mean [H, W, C] or [C], std [C]. It belongs to the weights."""

    mean: np.ndarray
    std: np.ndarray


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


def per_pixel_mean(split: Split) -> np.ndarray:
    """Return the mean image [H, W, C] float32 in [0, 1] (Sec. 4.2: "with the per-pixel mean subtracted")."""
    return (split.images.mean(0, dtype=np.float64) / 255).astype(np.float32)


def adapt_preprocessing(preprocessing: Preprocessing, image_shape: tuple[int, int, int]) -> Preprocessing:
    """Return what fits images (H, W, C): a mean image of another size says no more than its colour."""
    mean, std = preprocessing
    return Preprocessing(mean.mean((0, 1)) if mean.ndim == 3 and mean.shape != image_shape else mean, std)


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
