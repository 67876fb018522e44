"""Batch normalization over groups of images, with the running statistics threaded explicitly."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

RunningVariance = Literal["unbiased", "biased"]


class BatchNorm(nn.Module):
    """Normalize each channel by the statistics of `group_size` images (Ioffe & Szegedy 2015).

    The paper trains on several GPUs and each normalizes its own images: 64 on CIFAR, 32 on ImageNet. The group
    size gives the same statistics on any number of devices. Groups are consecutive images of the batch.

    Parameters `scale` and `bias` [C] and the running statistics `mean` and `var` [C] (collection `batch_stats`)
    are float32, and what is computed from them and the input is at least that.

    Attributes:
      group_size: images that share statistics; None for the whole batch.
      decay: share of the old value in each update of the running statistics (0.9 is PyTorch's momentum 0.1).
      running_variance: "unbiased" averages n/(n-1) times the variance of a group, as Ioffe & Szegedy (Alg. 2),
        Caffe and PyTorch do; "biased" the variance itself, as Flax and TensorFlow do. n = group_size * H * W.
      epsilon: added to the variance.
      frozen: normalize by the running statistics also with train=True, and never change them, scale or bias.
      dtype: of the output.
    """

    group_size: int | None = None
    decay: float = 0.9
    running_variance: RunningVariance = "unbiased"
    epsilon: float = 1e-5
    frozen: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Normalize x [N, ..., C]; with train=True by its own statistics, updating `batch_stats`.

        Raises:
          ValueError: with train=True, N is no multiple of the group size, or a group has a single value, which has no
            variance: the layer would give its bias whatever the input.
        """
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        at_least_float32 = jnp.promote_types(x.dtype, jnp.float32)
        if self.frozen:
            scale, bias = jax.lax.stop_gradient((scale, bias))
        if self.frozen or not train:
            factor = scale * jax.lax.rsqrt(running_var.value + self.epsilon)
            y = (x.astype(at_least_float32) - running_mean.value) * factor + bias
            return y.astype(self.dtype)

        group_size = self.group_size or len(x)
        if len(x) % group_size:
            raise ValueError(f"a batch of {len(x)} images does not divide into BN groups of {group_size}")
        groups = x.reshape(-1, group_size, *x.shape[1:]).astype(at_least_float32)  # [G, N/G, ..., C]
        inside = tuple(range(1, groups.ndim - 1))
        mean = groups.mean(inside, keepdims=True)
        # Two passes: E[x^2] - E[x]^2 cancels in float32 and can come out negative.
        var = jnp.square(groups - mean).mean(inside, keepdims=True)
        if not self.is_initializing():
            n = groups[0, ..., 0].size
            if n == 1:
                raise ValueError(f"BN of a single value: groups of 1 image of {x.shape[1:-1]} pixels have no variance")
            unbiased = n / (n - 1) if self.running_variance == "unbiased" else 1.0
            running_mean.value = self._decayed(running_mean.value, mean)
            running_var.value = self._decayed(running_var.value, var * unbiased)
        y = (groups - mean) * (scale * jax.lax.rsqrt(var + self.epsilon)) + bias
        return y.reshape(x.shape).astype(self.dtype)

    def _decayed(self, old: jax.Array, groups: jax.Array) -> jax.Array:
        """Move the running value [C] toward the mean over groups [G, 1, ..., C]."""
        new = groups.reshape(-1, groups.shape[-1]).mean(0)
        return self.decay * old + (1 - self.decay) * new
