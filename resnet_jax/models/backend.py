"""Which form of a convolution a network takes where it runs; the numbers are the same up to rounding."""

from __future__ import annotations

from functools import partial

import jax

from resnet_jax.models import cpu_conv, gpu_conv
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.vgg import VGG


def for_this_backend(model: ResNet | VGG, parts: int | None = None) -> ResNet | VGG:
    """Give a network the convolutions for CPUs or GPUs if it is to run there.

    For TPUs it stays as it is: XLA packs the stem's pixels there by itself.

    Args:
      model: a network.
      parts: devices that its images are spread over; None for all.
    """
    match jax.default_backend():
        case "cpu":
            parts = parts or jax.device_count()
            return model.clone(conv_general_dilated=partial(cpu_conv.conv_general_dilated, parts=parts))
        case "gpu":
            return model.clone(conv_general_dilated=gpu_conv.conv_general_dilated)
    return model
