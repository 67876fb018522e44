"""Pooling layers as modules, so that a summary of a network sees them."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
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
            rest = (length + 2 * self.margin - self.size) % self.stride
            return self.margin, self.margin + (self.stride - rest if self.ceil and rest else 0)

        return side(height), side(width)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Pool x [N, H, W, C]."""
        rows, columns = self.padding(*x.shape[1:3])
        # Padded here and not by max_pool, whose padding jax2onnx 0.17 drops; XLA makes one operation of both.
        x = jnp.pad(x, ((0, 0), rows, columns, (0, 0)), constant_values=-jnp.inf)
        size, stride = (self.size, self.size), (self.stride, self.stride)
        return nn.max_pool(x, window_shape=size, strides=stride, padding="VALID")


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
