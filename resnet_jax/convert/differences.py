"""What PyTorch's names of tensors do not say, and the lines that make the right network of PyTorch's own.

The names are those of torchvision's ResNets (and timm's), or of the CIFAR ResNets. A file with their tensors loads into
their networks, whatever it was trained as; these functions change such a network before that. They need torch only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from resnet_jax.convert.names import layout_of
from resnet_jax.models import VGG, Model
from resnet_jax.run.network_file import Names


class Difference(NamedTuple):
    """Something in which a network differs from PyTorch's of the same names.

    Attributes:
      what: in words.
      lines: Python that changes `net`, PyTorch's network, before its tensors are loaded.
      change: change(net) does the same.
    """

    what: str
    lines: str
    change: Callable[[Any], None]


def differences(model: Model, names: Names = "torch", *, folded: bool = False) -> list[Difference]:
    """Return in what a network is not that of PyTorch whose names its tensors get; nothing if it is the same."""
    if isinstance(model, VGG) or names == "resnet_jax":
        return []
    caffe_pool = model.stem == "imagenet" and model.pool_padding == "caffe"
    without_padding = "a max pool without padding, as Caffe's"
    if names == "hf":  # whose config.json says the rest
        return [_difference(without_padding, set_pooler)] if caffe_pool else []
    found = []
    if model.shortcut == "none":
        found.append(_difference("no shortcuts", remove_shortcuts))
    elif model.shortcut != ("A" if model.stem == "cifar" else "B"):
        what = f"shortcuts of option {model.shortcut}"
        options = () if model.shortcut == "A" else (model.shortcut == "C",)
        found.append(_difference(what, project_shortcuts if options else pad_shortcuts, *options))
    if caffe_pool:
        found.append(_difference(without_padding, set_pool))
    if model.block == "bottleneck" and model.stride_on == "1x1":
        found.append(_difference("the stride of a bottleneck on its first 1x1 convolution", set_stride))
    if folded:
        found.append(_difference("no BN, which is in its convolutions", take_bn_out))
    return found


def _difference(what: str, function: Callable[..., None], *options: bool) -> Difference:
    arguments = ", ".join(["net", *map(str, options)])
    lines = f"{inspect.getsource(function)}\n{function.__name__}({arguments})\n"
    return Difference(what, lines, lambda net: function(net, *options))


def explain(model: Model, names: Names = "torch", *, folded: bool = False) -> str:
    """Say in what PyTorch's network of the same names is another one, and how to change it; nothing if it is not."""
    found = differences(model, names, folded=folded)
    if not found:
        return ""
    theirs = "CIFAR ResNet" if layout_of(model) == "cifar" else "ResNet of torchvision or timm"
    theirs = "ResNetForImageClassification of transformers" if names == "hf" else theirs
    return (
        f"PyTorch's {theirs} with the same names of tensors is another network: this one has"
        f" {' and '.join(difference.what for difference in found)}. These lines change such a network, net, before"
        " net.load_state_dict():\n\n" + "\n\n".join(difference.lines for difference in found)
    )


def remove_shortcuts(net):
    import torch

    class Nothing(torch.nn.Module):
        def forward(self, x):
            return 0

    for block in (block for name, stage in net.named_children() if name.startswith("layer") for block in stage):
        setattr(block, "shortcut" if hasattr(block, "shortcut") else "downsample", Nothing())


def pad_shortcuts(net):
    import torch

    class Padded(torch.nn.Module):  # every second pixel, and zero channels, half on each side
        def __init__(self, stride, zeros):
            super().__init__()
            self.stride, self.padding = stride, (0, 0, 0, 0, zeros // 2, zeros // 2)

        def forward(self, x):
            return torch.nn.functional.pad(x[:, :, :: self.stride, :: self.stride], self.padding)

    for block in (block for name, stage in net.named_children() if name.startswith("layer") for block in stage):
        if block.downsample is not None:
            conv = block.downsample[0]
            block.downsample = Padded(conv.stride[0], conv.out_channels - conv.in_channels)


def project_shortcuts(net, everywhere):
    import torch

    for block in (block for name, stage in net.named_children() if name.startswith("layer") for block in stage):
        inputs, outputs = block.conv1.in_channels, getattr(block, "conv3", block.conv2).out_channels
        if everywhere or inputs != outputs:
            conv = torch.nn.Conv2d(inputs, outputs, 1, block.conv1.stride[0] * block.conv2.stride[0], bias=False)
            projection = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(outputs))
            setattr(block, "shortcut" if hasattr(block, "shortcut") else "downsample", projection)


def set_pool(net):
    import torch

    net.maxpool = torch.nn.MaxPool2d(3, 2, ceil_mode=True)


def set_stride(net):
    for stage in (net.layer2, net.layer3, net.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)


def take_bn_out(net):
    import torch

    for module in list(net.modules()):
        layers = dict(module.named_children())
        for name, layer in layers.items():
            norm = "1" if name == "0" else name.replace("conv", "bn")
            if isinstance(layer, torch.nn.Conv2d) and isinstance(layers.get(norm), torch.nn.BatchNorm2d):
                layer.bias = torch.nn.Parameter(torch.zeros(layer.out_channels))
                setattr(module, norm, torch.nn.Identity())


def set_pooler(net):
    import torch

    net.resnet.embedder.pooler = torch.nn.MaxPool2d(3, 2, ceil_mode=True)
