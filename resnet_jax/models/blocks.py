"""The building blocks of the paper's Fig. 5 and their shortcuts (Sec. 3.3, options A, B, C)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

Shortcut = Literal["none", "A", "B", "C"]
ZeroChannels = Literal["end", "both"]
StrideOn = Literal["1x1", "3x3"]


@jax.custom_jvp
def relu_at_end(x: jax.Array) -> jax.Array:
    """Rectify the end of a block; the mask of its gradient is read off the output, which the next block keeps anyway.

    Otherwise XLA for GPUs adds residual and shortcut once more for the mask (docs/performance.md).
    """
    return nn.relu(x)


@relu_at_end.defjvp
def _relu_at_end_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    y = nn.relu(*primals)
    if jax.default_backend() == "gpu":
        y = jax.lax.optimization_barrier(y)
    return y, jnp.where(y > 0, *tangents, 0)


class Block(nn.Module):
    """A residual function and its shortcut; the residual function is what the two kinds below differ in.

    Attributes:
      filters: of the 3x3 convolutions.
      stride: of the block.
      shortcut: "none" (plain net), "A" (identity, zero channels where dimensions grow), "B" (projection where
        dimensions grow, identity elsewhere) or "C" (projection in every block).
      zero_channels: where option A puts the new channels: behind the others, or half on each side.
      dilations: of the 3x3 convolutions up to the one that subsamples, and behind it; see ResNet.output_stride.
      conv: conv(filters, size, stride=, dilation=, name=) returns a convolution.
      norm: norm(name=) returns a normalization called with train=.
    """

    filters: int
    stride: int
    shortcut: Shortcut
    zero_channels: ZeroChannels
    dilations: tuple[int, int]
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    def residual(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Apply the residual function, whose output is not rectified."""
        raise TypeError(f"{type(self).__name__} has no residual function")

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map x [N, H, W, C] to [N, ceil(H/stride), ceil(W/stride), channels of the residual]."""
        y = self.residual(x, train=train)
        if self.shortcut != "none":
            y = y + self._shortcut(x, y.shape, train=train)
        return relu_at_end(y)  # after the addition (Sec. 3.2)

    def _shortcut(self, x: jax.Array, shape: tuple[int, ...], *, train: bool) -> jax.Array:
        """Bring x to the shape of the residual."""
        grows = x.shape != shape  # from the actual shapes: no arithmetic on widths that could go wrong
        if self.shortcut == "C" or (self.shortcut == "B" and grows):
            x = self.conv(shape[-1], 1, stride=self.stride, name="shortcut_conv")(x)
            return self.norm(name="shortcut_bn")(x, train=train)
        if not grows:
            return x
        new = shape[-1] - x.shape[-1]
        before = new // 2 if self.zero_channels == "both" else 0
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, new - before)))


class BasicBlock(Block):
    """Two 3x3 convolutions; the first one subsamples (Fig. 5, left)."""

    def residual(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = self.conv(self.filters, 3, stride=self.stride, dilation=self.dilations[0], name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y, train=train))
        y = self.conv(self.filters, 3, dilation=self.dilations[1], name="conv2")(y)
        return self.norm(name="bn2")(y, train=train)


class BottleneckBlock(Block):
    """1x1, 3x3 and 1x1 convolutions, the last with four times the filters (Fig. 5, right).

    Attributes:
      stride_on: which convolution subsamples: the first "1x1", as in the authors' networks, or the "3x3", as in
        torchvision and most later code. Weights of one do not work in the other.
    """

    stride_on: StrideOn

    def residual(self, x: jax.Array, *, train: bool) -> jax.Array:
        on_1x1, on_3x3 = (self.stride, 1) if self.stride_on == "1x1" else (1, self.stride)
        dilation = self.dilations[1 if self.stride_on == "1x1" else 0]
        y = self.conv(self.filters, 1, stride=on_1x1, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y, train=train))
        y = self.conv(self.filters, 3, stride=on_3x3, dilation=dilation, name="conv2")(y)
        y = nn.relu(self.norm(name="bn2")(y, train=train))
        y = self.conv(4 * self.filters, 1, name="conv3")(y)
        return self.norm(name="bn3")(y, train=train)
