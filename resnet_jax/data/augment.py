"""Normalization and augmentation in pure JAX, for use inside a jitted step."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def normalize(images: jax.Array, mean: jax.typing.ArrayLike, std: jax.typing.ArrayLike) -> jax.Array:
    """Scale uint8 images [N, H, W, C] to [0, 1], subtract `mean` and divide by `std` (both [H, W, C] or [C])."""
    return (images.astype(jnp.float32) / 255 - mean) / std


def random_crop(key: jax.Array, images: jax.Array, *, padding: int) -> jax.Array:
    """Pad each side by `padding` zeros and cut out a random window of the old size (Sec. 4.2).

    Args:
      key: random key; each image [H, W, C] of `images` [N, H, W, C] gets its own offset.
      images: normalized, so that zero is the mean.
      padding: in pixels.
    """
    count, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    offsets = jax.random.randint(key, (count, 2), 0, 2 * padding + 1)

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, channels))

    return jax.vmap(crop)(padded, offsets)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirror each image of [N, H, W, C] left to right with probability 1/2."""
    flip = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def random_lighting(key: jax.Array, images: jax.Array, lighting: jax.typing.ArrayLike) -> jax.Array:
    """Shift the colour of each image at random along the principal colours (Krizhevsky et al. 2012; Sec. 3.4).

    Args:
      key: random key; each image gets three numbers from a standard normal distribution.
      images: [N, H, W, 3].
      lighting: [3, 3]: what these numbers are multiplied by, in the units of the images: the eigenvectors of the
        covariance of colours, in columns, times their eigenvalues, times the strength of 0.1.
    """
    shifts = jnp.einsum("nk,ck->nc", jax.random.normal(key, (len(images), 3)), jnp.asarray(lighting))
    return images + shifts[:, None, None, :]
