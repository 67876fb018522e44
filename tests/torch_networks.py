"""The CIFAR ResNet that PyTorch's users have, written plainly, to hold exports to; and torchvision, where it is."""

from __future__ import annotations

from typing import Any

import pytest


def cifar_resnet(depth: int) -> Any:
    """Return it as an nn.Module: option A takes every second pixel and puts half of the zero channels on each side."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int):
            super().__init__()
            self.added = outputs - inputs
            self.conv1 = nn.Conv2d(inputs, outputs, 3, 2 if self.added else 1, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            if self.added:
                zeros = torch.zeros(len(x), self.added // 2, *y.shape[2:], dtype=x.dtype)
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
            return torch.relu(x + y)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            n = (depth - 2) // 6
            self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
            self.layer1 = nn.Sequential(*[Block(16, 16) for _ in range(n)])
            self.layer2 = nn.Sequential(Block(16, 32), *[Block(32, 32) for _ in range(n - 1)])
            self.layer3 = nn.Sequential(Block(32, 64), *[Block(64, 64) for _ in range(n - 1)])
            self.linear = nn.Linear(64, 10)

        def forward(self, x: Any) -> Any:
            x = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))))
            return self.linear(x.mean((2, 3)))

    return Network().eval()


def import_torchvision(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import torchvision, or skip; its networks work without its compiled operators, which need CUDA."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.library, "register_fake", lambda name, *function: lambda function: function)
    return pytest.importorskip("torchvision", reason="beside torchvision's own networks", exc_type=ImportError)
