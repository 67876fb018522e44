"""Networks as PyTorch users have them: torchvision's ResNets and VGGs, and the CIFAR ResNets, with their names.

What is exported for them is tried in these. Imported only where torch is installed.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from resnet_jax.models import VGG, Model, ResNet


def build(model: Model, channels: int = 3) -> nn.Module:
    """Return the network whose names the tensors of `model` get, as PyTorch has it: see differences.py.

    It maps images float32 [N, C, H, W], normalized, to logits [N, num_classes], or without a last layer to the mean
    over all positions of the last feature map, and is in evaluation mode.
    """
    return (_vgg(model, channels) if isinstance(model, VGG) else _ResNet(model, channels)).eval()


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class _Basic(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, filters: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, filters, 3, stride), nn.BatchNorm2d(filters)
        self.conv2, self.bn2 = _conv(filters, filters, 3), nn.BatchNorm2d(filters)
        self.downsample = _projection(inputs, filters, stride)

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.residual(x) + (x if self.downsample is None else self.downsample(x)))


class _Bottleneck(_Basic):
    expansion = 4

    def __init__(self, inputs: int, filters: int, stride: int):
        super().__init__(inputs, filters, stride)
        self.conv1, self.conv2 = _conv(inputs, filters, 1), _conv(filters, filters, 3, stride)
        self.conv3, self.bn3 = _conv(filters, 4 * filters, 1), nn.BatchNorm2d(4 * filters)
        self.downsample = _projection(inputs, 4 * filters, stride)

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn3(self.conv3(torch.relu(super().residual(x))))


class _Cifar(_Basic):
    def __init__(self, inputs: int, filters: int, stride: int):
        super().__init__(inputs, filters, stride)
        self.downsample = None
        self.shortcut: nn.Module = nn.Identity() if stride == 1 else _HalfZeros(filters - inputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.residual(x) + self.shortcut(x))


def _projection(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class _HalfZeros(nn.Module):
    """Option A: every second pixel, and half of the zero channels on each side."""

    def __init__(self, zeros: int):
        super().__init__()
        self.padding = (0, 0, 0, 0, zeros // 2, zeros // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(x[:, :, ::2, ::2], self.padding)


class _ResNet(nn.Module):
    def __init__(self, model: ResNet, channels: int):
        super().__init__()
        cifar, width = model.stem == "cifar", model.filters[0]
        self.conv1, self.bn1 = _conv(channels, width, *((3, 1) if cifar else (7, 2))), nn.BatchNorm2d(width)
        self.maxpool: nn.Module = nn.Identity() if cifar else nn.MaxPool2d(3, 2, 1)
        make = _Cifar if cifar else _Basic if model.block == "basic" else _Bottleneck
        for stage, (blocks, filters) in enumerate(zip(model.blocks, model.filters, strict=True), start=1):
            first = make(width, filters, 1 if stage == 1 else 2)
            width = filters * make.expansion
            others = [make(width, filters, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(first, *others))
        if not model.backbone_only:
            self.add_module("linear" if cifar else "fc", nn.Linear(width, model.num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for name, stage in self.named_children():
            x = stage(x) if name.startswith("layer") else x
        x = x.mean((2, 3))
        for name, head in self.named_children():
            x = head(x) if name in ("linear", "fc") else x
        return x


def _vgg(model: VGG, channels: int) -> nn.Module:
    layers: list[nn.Module] = []
    width = channels
    for convs, filters in zip(model.convs, (64, 128, 256, 512, 512), strict=True):
        for _ in range(convs):
            layers += [nn.Conv2d(width, filters, 3, padding=1), nn.ReLU()]
            width = filters
        layers.append(nn.MaxPool2d(2, 2))
    if model.backbone_only:
        return nn.Sequential(
            OrderedDict(features=nn.Sequential(*layers), avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
        )
    fc6, fc7, fc8 = nn.Linear(7 * 7 * width, 4096), nn.Linear(4096, 4096), nn.Linear(4096, model.num_classes)
    classifier = nn.Sequential(fc6, nn.ReLU(), nn.Dropout(), fc7, nn.ReLU(), nn.Dropout(), fc8)
    parts = {"features": nn.Sequential(*layers), "avgpool": nn.AdaptiveAvgPool2d(7), "flatten": nn.Flatten()}
    return nn.Sequential(OrderedDict(**parts, classifier=classifier))
