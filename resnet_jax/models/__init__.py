"""The paper's networks as flax.linen modules."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from resnet_jax.models.norm import BatchNorm
from resnet_jax.models.recalibrate import recalibrate_bn
from resnet_jax.models.resnet import IMAGENET_BLOCKS, ResNet, cifar_resnet, imagenet_resnet
from resnet_jax.models.stacking import stack_blocks, unstack_blocks
from resnet_jax.models.vgg import VGG, vgg

__all__ = [
    "VGG",
    "BatchNorm",
    "Model",
    "ModelName",
    "ResNet",
    "cifar_resnet",
    "create_model",
    "imagenet_resnet",
    "parse_name",
    "recalibrate_bn",
    "stack_blocks",
    "unstack_blocks",
    "vgg",
]

Model = ResNet | VGG
Family = Literal["cifar", "imagenet", "vgg"]

_BUILDERS: dict[Family, Callable[..., Model]] = {"cifar": cifar_resnet, "imagenet": imagenet_resnet, "vgg": vgg}


class ModelName(NamedTuple):
    """What a name such as "plain34" says."""

    family: Family
    depth: int
    plain: bool


def parse_name(name: str) -> ModelName:
    """Take a name apart: resnet or plain and a depth, or vgg16, vgg19.

    The depths 18, 34, 50, 101 and 152 mean the ImageNet networks, though 50 and 152 are 6n+2 as well.

    Raises:
      ValueError: it has another form.
    """
    match = re.fullmatch(r"(resnet|plain|vgg)(\d{1,6})", name)
    if not match:
        raise ValueError(f"unknown model {name!r}: use resnet20, plain56, resnet50, vgg16 and the like")
    kind, depth = match[1], int(match[2])
    if kind == "vgg":
        return ModelName("vgg", depth, plain=False)
    return ModelName("imagenet" if depth in IMAGENET_BLOCKS else "cifar", depth, plain=kind == "plain")


def build(family: Family, depth: int, **options: Any) -> Model:
    """Build a network of a family; the options are the attributes of ResNet or VGG.

    Raises:
      ValueError: the family has no such depth.
    """
    return _BUILDERS[family](depth, **options)


def create_model(name: str, **options: Any) -> Model:
    """Build a network by name.

    Args:
      name: "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "plain18", "plain34" (Table 1);
        "vgg16", "vgg19"; "resnet20", "plain56" and any other depth 6n+2 (Sec. 4.2).
      **options: attributes of ResNet or VGG, such as num_classes (10 for the CIFAR networks and 1000 for the
        others unless given), shortcut ("A" for the CIFAR networks and "B" for the others unless given),
        stride_on, pool_padding, bn_group_size, frozen_bn, backbone_only, scan_blocks, remat, dtype.

    Raises:
      ValueError: unknown name, wrong depth, or a plain net with a shortcut.
    """
    family, depth, plain = parse_name(name)
    if plain and options.setdefault("shortcut", "none") != "none":
        raise ValueError(f"{name} is a plain net and has no shortcut; got shortcut={options['shortcut']!r}")
    return build(family, depth, **options)
