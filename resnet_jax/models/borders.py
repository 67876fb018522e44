"""Images of different sizes in one batch: what is beyond the border of each has no influence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.models.pool import MaxPool


class Borders:
    """Where the images of a batch end, at every resolution that the network goes through."""

    def __init__(self, images: jax.Array, sizes: jax.Array):
        self._sizes = {images.shape[1:3]: sizes}  # size of the array: sizes of the images [N, 2]

    def of(self, x: jax.Array) -> jax.Array:
        """Return [N, 2], the extents of the images in feature maps x."""
        return self._sizes[x.shape[1:3]]

    def fill(self, x: jax.Array, value: float) -> jax.Array:
        """Set what is beyond the border in x [N, H, W, C] to `value`."""
        rows, columns = (jnp.arange(x.shape[1 + axis]) < self.of(x)[:, axis, None] for axis in (0, 1))
        return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], x, value)

    def respect(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        """Let layers that look at neighbours see padding beyond the border; an interceptor of methods."""
        layer = context.module
        if context.method_name != "__call__" or not isinstance(layer, nn.Conv | MaxPool):
            return call(*args, **kwargs)
        x = args[0]
        y = call(self.fill(x, 0 if isinstance(layer, nn.Conv) else -jnp.inf), *args[1:], **kwargs)
        if y.shape[1:3] != x.shape[1:3]:
            self._sizes[y.shape[1:3]] = _output_sizes(layer, self.of(x))
        return y


def _output_sizes(layer: Any, sizes: jax.Array) -> jax.Array:
    """Return the heights and widths [N, 2] of a layer's outputs for inputs of such sizes."""
    if isinstance(layer, MaxPool):
        steps = sizes + 2 * layer.margin - layer.size
        return (-(-steps // layer.stride) if layer.ceil else steps // layer.stride) + 1
    kernel, dilation, strides, padding = (
        np.array(value, np.int32) for value in (layer.kernel_size, layer.kernel_dilation, layer.strides, layer.padding)
    )
    return (sizes + padding.sum(1, dtype=np.int32) - (kernel - 1) * dilation - 1) // strides + 1
