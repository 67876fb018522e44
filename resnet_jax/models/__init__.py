"""The paper's networks as flax.linen modules; a family of networks is one file and one line of FAMILIES."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from resnet_jax.config import ModelConfig
from resnet_jax.errors import UserError, did_you_mean
from resnet_jax.models.norm import BatchNorm
from resnet_jax.models.recalibrate import recalibrate_bn
from resnet_jax.models.resnet import IMAGENET_BLOCKS, ResNet, cifar_resnet, imagenet_resnet
from resnet_jax.models.stacking import stack_blocks, unstack_blocks
from resnet_jax.models.vgg import VGG, vgg

__all__ = [
    "FAMILIES",
    "VGG",
    "BatchNorm",
    "Model",
    "ModelName",
    "ResNet",
    "abstract_variables",
    "build_model",
    "check_bn_groups",
    "cifar_resnet",
    "create_model",
    "freeze_all_but",
    "imagenet_resnet",
    "parse_name",
    "recalibrate_bn",
    "stack_blocks",
    "unstack_blocks",
    "vgg",
]

Model = ResNet | VGG


class Family(NamedTuple):
    """Networks that differ in depth: what builds one, and its class, whose attributes are the options."""

    build: Callable[..., Model]
    module: type[Model]


FAMILIES = {
    "cifar": Family(cifar_resnet, ResNet),
    "imagenet": Family(imagenet_resnet, ResNet),
    "vgg": Family(vgg, VGG),
}


class ModelName(NamedTuple):
    """What a name such as "plain34" or "resnet34A" says."""

    family: str
    depth: int
    plain: bool
    shortcut: str = ""  # A, B or C, where the name ends so


def parse_name(name: str) -> ModelName:
    """Take a name apart: resnet or plain and a depth, resnet34A and the like, or vgg16, vgg19.

    The depths 18, 34, 50, 101 and 152 mean the ImageNet networks, though 50 and 152 are 6n+2 as well.

    Raises:
      ValueError: it has another form.
    """
    match = re.fullmatch(r"(resnet|plain|vgg)(\d{1,6})([ABC]?)", name)
    if not match or (match[3] and match[1] != "resnet"):
        raise ValueError(f"unknown model {name!r}: use resnet20, plain56, resnet34A, resnet50, vgg16 and the like")
    kind, depth = match[1], int(match[2])
    if kind == "vgg":
        return ModelName("vgg", depth, plain=False)
    family = "imagenet" if depth in IMAGENET_BLOCKS else "cifar"
    return ModelName(family, depth, plain=kind == "plain", shortcut=match[3])


def build_model(config: ModelConfig, num_classes: int) -> Model:
    """Build the configured network; for no classes it is a backbone, without the layers behind its feature maps.

    Raises:
      UserError: there is no such family, or it has no such depth.
    """
    if config.family not in FAMILIES:
        hint = did_you_mean(config.family, FAMILIES)
        raise UserError(f"--model.family {config.family}: choose {', '.join(FAMILIES)}{hint}")
    family = FAMILIES[config.family]
    attributes = {field.name for field in dataclasses.fields(family.module)}
    options = {name: value for name, value in dataclasses.asdict(config).items() if name in attributes}
    options |= {"dtype": jnp.dtype(config.dtype), "num_classes": num_classes, "backbone_only": num_classes == 0}
    try:
        model = family.build(config.depth, **options)
    except ValueError as error:
        raise UserError(f"--model.depth: {error}") from error
    if config.width == 1:
        return model
    if not isinstance(model, ResNet):
        raise UserError(f"--model.width is for the families cifar and imagenet; got {config.width:g}")
    return model.clone(filters=tuple(max(1, round(config.width * filters)) for filters in model.filters))


def abstract_variables(model: Any, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return the shapes of `params` and `batch_stats` for images (H, W, C); nothing is computed."""
    images = jnp.zeros((1, *image_shape))
    shapes = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))
    return {"params": shapes["params"], "batch_stats": shapes.get("batch_stats", {})}


def freeze_all_but(model: Model, trainable: tuple[str, ...]) -> Model:
    """Return the network of which training changes some parts only; ("all",) are all.

    Raises:
      UserError: it has no such part.
    """
    if trainable == ("all",):
        return model
    if unknown := [part for part in trainable if part not in model.parts]:
        raise UserError(f"--optim.trainable {unknown[0]}: choose all, or some of {', '.join(model.parts)}")
    return model.clone(frozen=tuple(part for part in model.parts if part not in trainable))


def check_bn_groups(model: Model, image_shape: tuple[int, int, int], batch_size: int) -> None:
    """Check that every BN group of a batch has several values in the smallest map: one has no variance to divide by.

    Raises:
      UserError: it has not.
    """
    if isinstance(model, VGG) or model.frozen_bn:
        return
    stride = max(model.feature_strides.values())
    height, width = (-(-side // stride) for side in image_shape[:2])
    if (model.bn_group_size or batch_size) * height * width == 1:
        raise UserError(
            f"the last maps of images of {image_shape[0]}x{image_shape[1]} pixels are a single pixel, and BN needs more"
            " than one value: choose a larger --model.bn-group-size, --data.batch-size or image"
        )


def create_model(name: str, /, **options: Any) -> Model:
    """Build a network by name.

    Args:
      name: "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "plain18", "plain34" (Table 1);
        "resnet34A" and the like with a shortcut; "vgg16", "vgg19"; "resnet20", "plain56" and any other depth 6n+2
        (Sec. 4.2).
      **options: attributes of ResNet or VGG, such as num_classes (10 for the CIFAR networks and 1000 for the
        others unless given), shortcut ("A" for the CIFAR networks and "B" for the others unless given),
        stride_on, pool_padding, output_stride, bn_group_size, frozen_bn, backbone_only, scan_blocks, remat, dtype;
        inside another module also `name`, the key of its variables there.

    Raises:
      ValueError: unknown name, wrong depth, or a plain net with a shortcut.
    """
    family, depth, plain, shortcut = parse_name(name)
    if shortcut and options.setdefault("shortcut", shortcut) != shortcut:
        raise ValueError(f"{name} has shortcuts of option {shortcut}; got shortcut={options['shortcut']!r}")
    if plain and options.setdefault("shortcut", "none") != "none":
        raise ValueError(f"{name} is a plain net and has no shortcut; got shortcut={options['shortcut']!r}")
    return FAMILIES[family].build(depth, **options)
