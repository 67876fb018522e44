"""Convolutions as the paper has them: no bias where BN follows, padding as Caffe and PyTorch do it, He init."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Fan = Literal["fan_in", "fan_out"]
ConvGeneralDilated = Callable[..., jax.Array]  # jax.lax.conv_general_dilated, or cpu_conv's or gpu_conv's


def check_images(images: jax.Array) -> None:
    """Raise ValueError unless images are [N, H, W, C]."""
    if images.ndim != 4:
        of_one = ": images[None] is a batch of one" if images.ndim == 3 else ""
        raise ValueError(f"expected images [N, H, W, 3], got the shape {images.shape}{of_one}")


def he_init(fan: Fan) -> nn.initializers.Initializer:
    """Zero-mean Gaussian of variance 2/fan (He et al. 2015, "Delving deep into rectifiers", Sec. 2.2)."""
    return nn.initializers.variance_scaling(2.0, fan, "normal")


def conv(
    filters: int,
    size: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    use_bias: bool = False,
    init_fan: Fan = "fan_in",
    dtype: DTypeLike = jnp.float32,
    conv_general_dilated: ConvGeneralDilated = jax.lax.conv_general_dilated,
    name: str,
) -> nn.Conv:
    """Return a size x size convolution whose output is ceil(input / stride) wide.

    With a dilation its taps lie so many pixels apart.

    The padding is explicit: "SAME" would pad a 3x3 of stride 2 on an even input by (0, 1), which shifts the
    sampling grid against the (1, 1) of Caffe and PyTorch.
    """
    margin = (dilation * (size // 2),) * 2
    return nn.Conv(
        filters,
        (size, size),
        strides=(stride, stride),
        padding=(margin, margin),
        kernel_dilation=(dilation, dilation),
        use_bias=use_bias,
        kernel_init=he_init(init_fan),
        dtype=dtype,
        conv_general_dilated=conv_general_dilated,
        name=name,
    )
