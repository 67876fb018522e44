"""The building block of the paper's Fig. 5 (left) and its shortcuts (Sec. 3.3, options A, B, C)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

Shortcut = Literal["none", "A", "B", "C"]
ZeroChannels = Literal["end", "both"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the first one subsamples.

    Attributes:
      filters: output channels.
      stride: of the first convolution.
      shortcut: "none" (plain net), "A" (identity, zero channels where dimensions grow), "B" (projection where
        dimensions grow, identity elsewhere) or "C" (projection in every block).
      zero_channels: where option A puts the new channels: behind the others, or half on each side.
      conv: conv(filters, size, stride=, name=) returns a convolution.
      norm: norm(name=) returns a normalization called with train=.
    """

    filters: int
    stride: int
    shortcut: Shortcut
    zero_channels: ZeroChannels
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map x [N, H, W, C] to [N, ceil(H/stride), ceil(W/stride), filters]."""
        y = self.conv(self.filters, 3, stride=self.stride, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y, train=train))
        y = self.conv(self.filters, 3, name="conv2")(y)
        y = self.norm(name="bn2")(y, train=train)
        if self.shortcut != "none":
            y = y + self._shortcut(x, y.shape, train=train)
        return nn.relu(y)  # after the addition (Sec. 3.2)

    def _shortcut(self, x: jax.Array, shape: tuple[int, ...], *, train: bool) -> jax.Array:
        """Bring x to the shape of the residual."""
        grows = x.shape != shape  # from the actual shapes: no arithmetic on widths that could go wrong
        if self.shortcut == "C" or (self.shortcut == "B" and grows):
            x = self.conv(self.filters, 1, stride=self.stride, name="shortcut_conv")(x)
            return self.norm(name="shortcut_bn")(x, train=train)
        if not grows:
            return x
        new = self.filters - x.shape[-1]
        before = new // 2 if self.zero_channels == "both" else 0
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, new - before)))
