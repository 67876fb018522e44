"""Batch normalization over groups of images, with the running statistics threaded explicitly."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

RunningVariance = Literal["unbiased", "biased"]

_ROW = 128  # values that a GPU reads at once
_PARTS = 64  # of a group, each summed up by itself: enough to occupy a GPU


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
        if self.frozen:
            scale, bias = jax.lax.stop_gradient((scale, bias))
        if self.frozen or not train:
            factor = scale * jax.lax.rsqrt(running_var.value + self.epsilon)
            y = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) - running_mean.value) * factor + bias
            return y.astype(self.dtype)

        group_size = self.group_size or len(x)
        if len(x) % group_size:
            raise ValueError(f"a batch of {len(x)} images does not divide into BN groups of {group_size}")
        groups = x.reshape(-1, group_size, *x.shape[1:])  # [G, N/G, ..., C]
        y, mean, var = normalize_groups(groups, scale, bias, self.epsilon, jnp.dtype(self.dtype))
        if not self.is_initializing():
            n = groups[0, ..., 0].size
            if n == 1:
                raise ValueError(f"BN of a single value: groups of 1 image of {x.shape[1:-1]} pixels have no variance")
            unbiased = n / (n - 1) if self.running_variance == "unbiased" else 1.0
            running_mean.value = self._decayed(running_mean.value, mean)
            running_var.value = self._decayed(running_var.value, var * unbiased)
        return y.reshape(x.shape)

    def _decayed(self, old: jax.Array, groups: jax.Array) -> jax.Array:
        """Move the running value [C] toward the mean over groups [G, C]."""
        return self.decay * old + (1 - self.decay) * groups.mean(0)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize_groups(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalize each group by its own statistics, read once for them, forward and backward.

    The backward pass keeps x as it is, and numbers for each group and channel; nothing else of its size.

    Args:
      x: groups [G, N, ..., C].
      scale, bias: [C].
      epsilon: added to the variance.
      dtype: of the normalized groups.

    Returns:
      The normalized groups; their mean and biased variance [G, C], in float32 or more, which have no gradient.
    """
    return _forward(x, scale, bias, epsilon, dtype)[0]


def _forward(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: jnp.dtype) -> tuple[Any, Any]:
    rows, n, computed = _Rows(x), x[0, ..., 0].size, jnp.promote_types(x.dtype, jnp.float32)
    # Summed up is the distance from a value of the group. So E[d^2] - E[d]^2 does not cancel however far the mean is
    # from 0, and is 0 where all values are the same.
    shift = x[(slice(None), *(0,) * (x.ndim - 2))].astype(computed)  # [G, C]
    d = rows.of(x).astype(computed) - rows.over(shift)
    sum_d, sum_d2 = rows.sums(d, jnp.square(d))
    mean, var = shift + sum_d / n, jnp.maximum(sum_d2 / n - jnp.square(sum_d / n), 0)
    inverse = jax.lax.rsqrt(var + epsilon)
    # Otherwise XLA would sum up once for the statistics and once more for what follows.
    mean, var, inverse, factor = jax.lax.optimization_barrier((mean, var, inverse, scale * inverse))
    y = (rows.of(x).astype(computed) - rows.over(mean)) * rows.over(factor) + rows.over(bias[None])
    return (y.astype(dtype).reshape(x.shape), mean, var), (x, mean, inverse, factor)


def _backward(epsilon: float, dtype: jnp.dtype, residuals: Any, cotangents: Any) -> tuple[jax.Array, ...]:
    """Ioffe & Szegedy, Sec. 3: dx = factor (dy - mean(dy) - (x - mean) mean(dy (x - mean)) / (var + epsilon))."""
    del epsilon, dtype
    x, mean, inverse, factor = residuals
    rows, n = _Rows(x), x[0, ..., 0].size
    dy, d = rows.of(cotangents[0]).astype(mean.dtype), rows.of(x).astype(mean.dtype) - rows.over(mean)
    sum_dy, sum_dy_d = rows.sums(dy, dy * d)
    a, b = jax.lax.optimization_barrier((factor * sum_dy / n, factor * jnp.square(inverse) * sum_dy_d / n))
    dx = rows.over(factor) * dy - rows.over(a) - rows.over(b) * d
    return dx.astype(x.dtype).reshape(x.shape), (inverse * sum_dy_d).sum(0), sum_dy.sum(0)


normalize_groups.defvjp(_forward, _backward)


class _Rows:
    """Groups [G, N, ..., C] as they are summed up: on a GPU in long rows, elsewhere as they lie.

    XLA sums up columns on a GPU, and reads 16 or 32 channels poorly: several pixels make a row of 128 values. A TPU
    lays the images innermost, and would have to turn all of it around.
    """

    def __init__(self, x: jax.Array):
        self._groups, *inside, self._channels = x.shape
        self._row, self._parts = self._channels, 1
        if jax.default_backend() == "gpu":
            size = math.prod(inside)
            if _ROW % self._channels == 0 and size * self._channels % _ROW == 0:
                self._row, size = _ROW, size * self._channels // _ROW
            self._parts = math.gcd(size, _PARTS)
            inside = [self._parts, size // self._parts]
        self._shape = (self._groups, *inside, self._row)

    def of(self, x: jax.Array) -> jax.Array:
        """Return groups of this shape as rows."""
        return x.reshape(self._shape)

    def over(self, values: jax.Array) -> jax.Array:
        """Return values [G, C] or [1, C] so that they broadcast over rows."""
        ones = (1,) * (len(self._shape) - 2)
        return jnp.tile(values, self._row // self._channels).reshape(len(values), *ones, self._row)

    def sums(self, *summands: jax.Array) -> jax.Array:
        """Sum rows up to [summands, G, C]."""
        inside = tuple(range(1 if self._parts == 1 else 2, len(self._shape) - 1))
        parts = jnp.stack([rows.sum(inside) for rows in summands])
        return parts.reshape(len(summands), self._groups, -1, self._channels).sum(2)
