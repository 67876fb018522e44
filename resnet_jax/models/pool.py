"""Pooling layers as modules, so that a summary of a network sees them."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

PoolPadding = Literal["caffe", "torch"]
Margins = tuple[tuple[int, int], tuple[int, int]]


class MaxPool(nn.Module):
    """Max pooling over size x size windows.

    Attributes:
      size, stride: in pixels.
      margin: padding on each side, in pixels.
      ceil: pad the far sides further so that no pixel is left out (Caffe's rounding); else windows that do not
        fit are dropped (PyTorch's default).
    """

    size: int
    stride: int
    margin: int = 0
    ceil: bool = False

    def padding(self, height: int, width: int) -> Margins:
        """Return ((top, bottom), (left, right)) for an input of that size."""

        def side(length: int) -> tuple[int, int]:
            if self.ceil and jax.export.is_symbolic_dim(length):
                return self.margin, self.margin + self.stride - 1  # of which a window may not need all
            rest = (length + 2 * self.margin - self.size) % self.stride
            return self.margin, self.margin + (self.stride - rest if self.ceil and rest else 0)

        return side(height), side(width)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Pool x [N, H, W, C]."""
        return _max_pool(x, self.size, self.stride, self.padding(*x.shape[1:3]))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x: jax.Array, size: int, stride: int, margins: Margins) -> jax.Array:
    # Padded here and not by max_pool, whose padding jax2onnx 0.17 drops.
    x = jnp.pad(x, ((0, 0), *margins, (0, 0)), constant_values=-jnp.inf)
    return nn.max_pool(x, window_shape=(size, size), strides=(stride, stride), padding="VALID")


def _pool(x: jax.Array, size: int, stride: int, margins: Margins) -> jax.Array:
    """Do the same where a gradient is wanted, and no ONNX: without a padded copy, which XLA for TPUs would make."""
    return nn.max_pool(x, window_shape=(size, size), strides=(stride, stride), padding=margins)


def _forward(x: jax.Array, size: int, stride: int, margins: Margins) -> Any:
    """Pool, and keep which tap of each window is its maximum; of equal ones the first in row-major order."""
    y = _pool(x, size, stride, margins)
    padded = jnp.pad(x, ((0, 0), *margins, (0, 0)), constant_values=-jnp.inf)
    index = jnp.full(y.shape, size * size - 1, jnp.uint8)
    for tap in reversed(range(size * size - 1)):
        starts = divmod(tap, size)
        rows, columns = (
            slice(start, start + (length - 1) * stride + 1, stride)
            for start, length in zip(starts, y.shape[1:3], strict=True)
        )
        index = jnp.where(padded[:, rows, columns] == y, jnp.uint8(tap), index)
    return y, (x, index)


def _backward(size: int, stride: int, margins: Margins, saved: Any, dy: jax.Array) -> tuple[jax.Array]:
    """Bring each dy [N, H', W', C] to the pixel that it comes from: the gradient [N, H, W, C].

    XLA's own backward pass, select-and-scatter, searches for the maxima once more. TPUs have an operation for it; on
    GPUs it is fills, copies and additions in any order (docs/reliability.md), on CPUs a slow loop.
    """

    def select_and_scatter(x: jax.Array, index: jax.Array, dy: jax.Array) -> jax.Array:
        del index  # and so XLA leaves out what computes it
        return jax.vjp(lambda x: _pool(x, size, stride, margins), x)[1](dy)[0]

    def gather(x: jax.Array, index: jax.Array, dy: jax.Array) -> jax.Array:
        return _gather(index, dy, x.shape, size, stride, margins)

    return (jax.lax.platform_dependent(*saved, dy, tpu=select_and_scatter, default=gather),)


_max_pool.defvjp(_forward, _backward)


def _gather(
    index: jax.Array, dy: jax.Array, shape: tuple[int, ...], size: int, stride: int, margins: Margins
) -> jax.Array:
    """Let every pixel look at the windows that it is in, and sum in float32 what is for it: [N, H, W, C].

    With margins pixel (i stride + a, j stride + b), a and b below the stride, is in the windows (i - up, j - left);
    there it is the tap (up stride + a, left stride + b), as long as that is below the size.
    """
    lengths = [length + before for length, (before, _) in zip(shape[1:3], margins, strict=True)]
    rows, columns = (-(-length // stride) for length in lengths)
    total = jnp.zeros((), jnp.promote_types(dy.dtype, jnp.float32))
    for up, left in np.ndindex(-(-size // stride), -(-size // stride)):
        shift = (0, 0, 0), (up, rows - up - dy.shape[1], 0), (left, columns - left - dy.shape[2], 0), (0, 0, 0)
        there = [jax.lax.pad(a, jnp.zeros((), a.dtype), shift)[:, :, None, :, None] for a in (dy, index)]
        row, column = (n * stride + np.arange(stride) for n in (up, left))
        taps = row[:, None] * size + column
        taps[(row[:, None] >= size) | (column >= size)] = size * size  # no tap: the window ends before
        mine = there[1] == taps[:, None, :, None].astype(np.uint8)
        total = total + jnp.where(mine, there[0], 0)
    total = total.astype(dy.dtype).reshape(shape[0], rows * stride, columns * stride, shape[3])
    return total[:, margins[0][0] : lengths[0], margins[1][0] : lengths[1]]


def stem_pool(padding: PoolPadding) -> MaxPool:
    """Return the 3x3 max pool of stride 2 behind conv1: unpadded with Caffe's rounding, or padded by 1."""
    if padding == "caffe":
        return MaxPool(3, 2, ceil=True, name="pool1")
    return MaxPool(3, 2, margin=1, name="pool1")


class GlobalAveragePool(nn.Module):
    """The mean over all positions, in float32 (or in float64 of that)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [N, H, W, C] to [N, C] float32."""
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))


class AdaptiveAveragePool(nn.Module):
    """Average an input of any size in side x side bins that may overlap; the identity for that size."""

    side: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [N, H, W, C] to [N, side, side, C]."""
        rows, columns = (jnp.asarray(self._weights(length), x.dtype) for length in x.shape[1:3])
        return jnp.einsum("ih,jw,nhwc->nijc", rows, columns, x)

    def _weights(self, length: int) -> np.ndarray:
        """Bin i is the mean of the positions from floor(i length / side) up to ceil((i+1) length / side)."""
        weights = np.zeros((self.side, length))
        for i in range(self.side):
            start, stop = i * length // self.side, -(-(i + 1) * length // self.side)
            weights[i, start:stop] = 1 / (stop - start)
        return weights
