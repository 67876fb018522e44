"""The paper's networks as flax.linen modules."""

from __future__ import annotations

import re
from typing import Any

from resnet_jax.models.norm import BatchNorm
from resnet_jax.models.resnet import ResNet, cifar_resnet

__all__ = ["BatchNorm", "ResNet", "cifar_resnet", "create_model"]

_IMAGENET_DEPTHS = (18, 34, 50, 101, 152)


def create_model(name: str, *, num_classes: int = 10, **options: Any) -> ResNet:
    """Build a network by name: "resnet20", "plain56", any other depth 6n+2 of the CIFAR networks (Sec. 4.2).

    Args:
      name: "resnet" or "plain" and the depth.
      num_classes: width of the last layer.
      **options: further attributes of ResNet; a plain net is shortcut="none" and takes no other shortcut.

    Raises:
      ValueError: unknown name, wrong depth, or a plain net with a shortcut.
    """
    match = re.fullmatch(r"(resnet|plain)(\d+)", name)
    if not match:
        raise ValueError(f"unknown model {name!r}: use resnet or plain and a depth, as in resnet20 or plain56")
    family, depth = match[1], int(match[2])
    if depth in _IMAGENET_DEPTHS:  # 50 and 152 are 6n+2 too, but everybody means the ImageNet network
        raise ValueError(f"{name} names an ImageNet network; the CIFAR network is cifar_resnet({depth})")
    if family == "plain" and options.setdefault("shortcut", "none") != "none":
        raise ValueError(f"{name} is a plain net and has no shortcut; got shortcut={options['shortcut']!r}")
    return cifar_resnet(depth, num_classes=num_classes, **options)
