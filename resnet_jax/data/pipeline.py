"""Batches of a data set that lives on the device; each is a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable
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
SampleBatch = Callable[[DeviceSplit, jax.Array], Batch]


def per_pixel_mean(split: Split) -> np.ndarray:
    """Return the mean image [H, W, C] float32 in [0, 1] (Sec. 4.2: "with the per-pixel mean subtracted")."""
    return (split.images.mean(0, dtype=np.float64) / 255).astype(np.float32)


def batch_indices(key: jax.Array, step: jax.Array, *, batch_size: int, num_images: int) -> jax.Array:
    """Return which images make up the batch of `step`: [batch_size] int32.

    The epochs form one endless stream, each a permutation of its own, cut into batches: every image comes
    exactly once an epoch, no remainder is dropped, and a batch may straddle two epochs.

    Raises:
      ValueError: the batch is larger than the data set.
    """
    if batch_size > num_images:
        raise ValueError(f"a batch of {batch_size} is larger than the data set of {num_images} images")
    positions = step * batch_size + jnp.arange(batch_size)
    epochs, places = positions // num_images, positions % num_images

    def order(epoch: jax.Array) -> jax.Array:
        return jax.random.permutation(jax.random.fold_in(key, epoch), num_images)

    first, last = epochs[0], epochs[-1]
    order_first = order(first)
    order_last = jax.lax.cond(last > first, order, lambda _: order_first, last)
    return jnp.where(epochs == first, order_first[places], order_last[places])


def make_sample_batch(
    key: jax.Array,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    num_images: int,
    padding: int,
    flip: bool,
    sharding: jax.sharding.Sharding | None = None,
) -> SampleBatch:
    """Return sample_batch(split, step): shuffled, normalized and augmented, to be called inside a jitted step.

    Args:
      key: random key of the run.
      preprocessing: mean and std.
      batch_size: images in a batch.
      num_images: size of the split.
      padding: of the random crop, in pixels; 0 for no crop.
      flip: whether images are mirrored at random.
      sharding: of the batch over devices.
    """
    order_key, augment_key = jax.random.split(key)

    def sample_batch(split: DeviceSplit, step: jax.Array) -> Batch:
        indices = batch_indices(order_key, step, batch_size=batch_size, num_images=num_images)
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

    return sample_batch


def make_take_batch(
    preprocessing: Preprocessing, *, batch_size: int, sharding: jax.sharding.Sharding | None = None
) -> SampleBatch:
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
