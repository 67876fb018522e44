"""The paper's networks in PyTorch, written plainly; for comparison only."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_IMAGENET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def _conv_bn(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class ZeroChannels(nn.Module):
    """Option A: every second pixel, and zeros for the new channels."""

    def __init__(self, new_channels: int, stride: int):
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


class Block(nn.Module):
    """Two 3x3 convolutions, or a bottleneck whose first 1x1 subsamples."""

    def __init__(self, inputs: int, filters: int, stride: int, *, bottleneck: bool, projection: bool):
        super().__init__()
        outputs = 4 * filters if bottleneck else filters
        if bottleneck:
            convs = [_conv_bn(inputs, filters, 1, stride), _conv_bn(filters, filters, 3), _conv_bn(filters, outputs, 1)]
        else:
            convs = [_conv_bn(inputs, filters, 3, stride), _conv_bn(filters, filters, 3)]
        self.convs = nn.ModuleList(convs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            grow = _conv_bn(inputs, outputs, 1, stride) if projection else ZeroChannels(outputs - inputs, stride)
            self.shortcut = grow

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs[:-1]:
            y = functional.relu(conv(y), inplace=True)
        return functional.relu(self.convs[-1](y) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """CIFAR (three stages, option A) or ImageNet (four stages, option B)."""

    def __init__(self, blocks: tuple[int, ...], *, bottleneck: bool, num_classes: int):
        super().__init__()
        imagenet = len(blocks) == 4
        filters = 64 if imagenet else 16
        stem = _conv_bn(3, filters, 7, 2) if imagenet else _conv_bn(3, filters, 3)
        layers: list[nn.Module] = [stem, nn.ReLU(inplace=True)]
        if imagenet:
            layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
        inputs = filters
        for stage, count in enumerate(blocks):
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                layers.append(Block(inputs, filters, stride, bottleneck=bottleneck, projection=imagenet))
                inputs = 4 * filters if bottleneck else filters
            filters *= 2
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class VGG16(nn.Module):
    """Configuration D."""

    def __init__(self, num_classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for filters, convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(convs):
                layers += [nn.Conv2d(inputs, filters, 3, padding=1), nn.ReLU(inplace=True)]
                inputs = filters
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        hidden: list[nn.Module] = []
        for width in (7 * 7 * 512, 4096):
            hidden += [nn.Linear(width, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5)]
        self.classifier = nn.Sequential(*hidden, nn.Linear(4096, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


def build(network: str, num_classes: int) -> nn.Module:
    """Return "resnet20", "resnet50", "vgg16" and the like."""
    if network == "vgg16":
        return VGG16(num_classes)
    depth = int(network.removeprefix("resnet"))
    if depth in _IMAGENET_BLOCKS:
        return ResNet(_IMAGENET_BLOCKS[depth], bottleneck=depth >= 50, num_classes=num_classes)
    return ResNet(((depth - 2) // 6,) * 3, bottleneck=False, num_classes=num_classes)
