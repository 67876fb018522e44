"""The peers "PyTorch" and "torch.compile": the networks written plainly; channels_last, autocast for bfloat16."""

from __future__ import annotations

import time
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.cases import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Case, Prepared, UnavailableError


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


def build(case: Case) -> nn.Module:
    """Return the network of a case."""
    if case.family == "vgg":
        return VGG16(case.num_classes)
    bottleneck = case.family == "imagenet" and case.depth >= 50
    return ResNet(case.num_blocks, bottleneck=bottleneck, num_classes=case.num_classes)


def prepare(case: Case, *, mode: str | None = None) -> Prepared:
    """Make the batches and the network; with a `mode` of torch.compile the first step is run too, since it compiles.

    Raises:
      UnavailableError: a case for the GPU and a PyTorch without one.
    """
    on_gpu = case.platform == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise UnavailableError("no CUDA")
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True  # as cuDNN and XLA do
    torch.backends.cudnn.benchmark = True  # choose the algorithms for these shapes, as XLA does
    torch.manual_seed(0)
    shape = (case.batch_size, 3, case.image_size, case.image_size)
    pool = [
        (
            torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last),
            torch.randint(case.num_classes, (case.batch_size,), device=device),
        )
        for _ in range(case.pool_batches)
    ]
    train = case.mode == "train"
    network: Any = build(case)
    network.train(train).to(device=device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=on_gpu or None
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == "bfloat16")
    batches = cycle(pool)

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(network(images), labels)

    forward, compute_loss = network, loss_of
    if mode:
        forward, compute_loss = torch.compile(network, mode=mode), torch.compile(loss_of, mode=mode)

    def train_steps(steps: int) -> None:
        for images, labels in islice(batches, steps):
            optimizer.zero_grad(set_to_none=True)
            with autocast:
                loss = compute_loss(images, labels)
            loss.backward()
            optimizer.step()

    @torch.inference_mode()
    def inference_steps(steps: int) -> None:
        with autocast:
            for images, _ in islice(batches, steps):
                forward(images)

    def compute(steps: int) -> None:
        (train_steps if train else inference_steps)(steps)
        if on_gpu:
            torch.cuda.synchronize()

    compile_seconds = None
    if mode:
        began = time.perf_counter()
        compute(1)
        compile_seconds = time.perf_counter() - began
    settings: dict[str, Any] = {"threads": torch.get_num_threads()}
    if on_gpu:
        settings = {"TF32 convolutions": torch.backends.cudnn.allow_tf32}
        settings |= {"TF32 matrix products": torch.backends.cuda.matmul.allow_tf32, "cudnn.benchmark": True}
    peak = torch.cuda.max_memory_allocated if on_gpu else lambda: None
    return Prepared(compute, 1, compile_seconds, peak, settings)
