"""Write imagenet.npz: golden values of the paper's ImageNet networks and of VGG, computed by PyTorch in float64.

Written from Sec. 3.3, Fig. 5 and Table 1 of the paper and from Table 1 of Simonyan & Zisserman (arXiv 1409.1556,
columns D and E), independently of `resnet_jax`; it needs torch and numpy only. To run it, from the root of the
repository:

    python tests/golden/make_torch_imagenet.py

The stored file was made with Python 3.11.7, torch 2.13.0 (CPU) and numpy 2.4.6. Its keys, for each network of
IMAGENET_RESNETS and VGGS in inputs.py; P parameters and S statistics in sorted order of their names:

    resnet50/param_names, resnet50/stats_names     slash-separated names, as in a checkpoint, joined by newlines
    resnet50/eval/logits [2, 20]                   with the given running statistics
    resnet50/eval/norms [5], samples [5, 32]       L2 norms and 32 values each (NHWC order) of conv1, conv2_x, ...,
                                                   conv5_x; of VGG the five stages after their max pools
    resnet50/train/logits [4, 20], loss            one training step, batch norm over all 4 images, with the parameters
                                                   changed by open_relus in inputs.py; resnet50 only
    resnet50/train/grad_norms [P], grad_samples [P, 32]
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from inputs import (
    IMAGENET_CLASSES,
    IMAGENET_RESNETS,
    RESNET_IMAGE,
    VGG_IMAGE,
    VGGS,
    make_imagenet_images,
    make_imagenet_training_batch,
    make_tensors,
    open_relus,
    sample,
)

EPSILON = 1e-5
# Table 1 of the paper: blocks in conv2_x, conv3_x, conv4_x, conv5_x.
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
WIDTHS = (64, 128, 256, 512)
# Table 1 of the VGG paper: 3x3 convolutions in each stage of D (16 layers) and E (19 layers).
VGG_CONVS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
VGG_WIDTHS = (64, 128, 256, 512, 512)


class Tensors(dict):
    """Parameters and statistics by name; each is made when a network first asks for it."""

    def get(self, name, shape):
        """Return the float64 tensor `name`."""
        if name not in self:
            self[name] = torch.from_numpy(make_tensors({name: shape})[name]).double()
        return self[name]

    def names(self, *, stats):
        """Return the sorted names of the running statistics or of the parameters."""
        return sorted(name for name in self if name.endswith(("/mean", "/var")) == stats)


class ResNet:
    """ResNet-18/34/50/101/152 and their plain versions as plain arithmetic on Tensors."""

    def __init__(self, depth, *, shortcut, pool_padding, stride_on=None):
        self.blocks = BLOCKS[depth]
        self.block = self.basic if depth < 50 else self.bottleneck
        self.shortcut, self.pool_padding, self.stride_on = shortcut, pool_padding, stride_on
        self.tensors = Tensors()
        self.train = False  # whether batch norm takes the statistics of the batch

    def __call__(self, x):
        """Return (logits, [conv1, conv2_x, ..., conv5_x] as [N, C, H, W]) of images [N, 3, H, W]."""
        x = self.conv_bn(x, "stem_conv", "stem_bn", 7, 64, stride=2).relu()
        outputs = [x]
        if self.pool_padding == "caffe":  # no padding; the last window may reach over the edge
            x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
        else:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage, (blocks, width) in enumerate(zip(self.blocks, WIDTHS, strict=True), start=1):
            for block in range(1, blocks + 1):
                # Table 1: conv3_1, conv4_1 and conv5_1 subsample; conv2_1 follows the pool and does not.
                x = self.block(x, f"stage{stage}_block{block}", width, 2 if stage > 1 and block == 1 else 1)
            outputs.append(x)
        return dense(self.tensors, x.mean((2, 3)), "fc", IMAGENET_CLASSES), outputs

    def basic(self, x, prefix, width, stride):
        """Fig. 5, left: two 3x3 convolutions."""
        y = self.conv_bn(x, f"{prefix}/conv1", f"{prefix}/bn1", 3, width, stride).relu()
        y = self.conv_bn(y, f"{prefix}/conv2", f"{prefix}/bn2", 3, width)
        return self.add(x, y, prefix, stride)

    def bottleneck(self, x, prefix, width, stride):
        """Fig. 5, right: 1x1, 3x3 and 1x1 to four times the width."""
        on_1x1, on_3x3 = {"1x1": (stride, 1), "3x3": (1, stride)}[self.stride_on]
        y = self.conv_bn(x, f"{prefix}/conv1", f"{prefix}/bn1", 1, width, on_1x1).relu()
        y = self.conv_bn(y, f"{prefix}/conv2", f"{prefix}/bn2", 3, width, on_3x3).relu()
        y = self.conv_bn(y, f"{prefix}/conv3", f"{prefix}/bn3", 1, 4 * width)
        return self.add(x, y, prefix, stride)

    def add(self, x, residual, prefix, stride):
        """Return relu(residual + shortcut(x)), or relu(residual) in a plain network (Sec. 3.3)."""
        if self.shortcut == "none":
            return residual.relu()
        new = residual.shape[1] - x.shape[1]
        if self.shortcut == "C" or (self.shortcut == "B" and new):
            x = self.conv_bn(x, f"{prefix}/shortcut_conv", f"{prefix}/shortcut_bn", 1, residual.shape[1], stride)
        elif new:  # option A: "extra zero entries padded for increasing dimensions"
            x = F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, new))
        return (residual + x).relu()

    def conv_bn(self, x, conv, bn, size, width, stride=1):
        """Convolve without bias, padded so that stride 1 keeps the size, then normalise."""
        x = conv2d(self.tensors, x, conv, size, width, stride)
        if self.train:
            mean = x.mean((0, 2, 3), keepdim=True)
            var = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
        else:
            mean, var = (channels(self.tensors.get(f"{bn}/{kind}", (width,))) for kind in ("mean", "var"))
        scale, bias = (channels(self.tensors.get(f"{bn}/{kind}", (width,))) for kind in ("scale", "bias"))
        return (x - mean) / torch.sqrt(var + EPSILON) * scale + bias


class VGG:
    """VGG-16 (D) and VGG-19 (E) without dropout, as in evaluation."""

    def __init__(self, depth):
        self.convs = VGG_CONVS[depth]
        self.tensors = Tensors()

    def __call__(self, x):
        """Return (logits, outputs of the five stages as [N, C, H, W]) of images [N, 3, H, W]."""
        outputs = []
        for stage, (convs, width) in enumerate(zip(self.convs, VGG_WIDTHS, strict=True), start=1):
            for conv in range(1, convs + 1):
                name = f"conv{stage}_{conv}"
                x = conv2d(self.tensors, x, name, 3, width) + channels(self.tensors.get(f"{name}/bias", (width,)))
                x = x.relu()
            x = F.max_pool2d(x, 2, stride=2)
            outputs.append(x)
        # Images of 224x224 arrive here as 7x7; others are brought to it, as torchvision does.
        x = F.adaptive_avg_pool2d(x, 7).permute(0, 2, 3, 1).flatten(1)  # fc6 takes its input in order H, W, C
        x = dense(self.tensors, x, "fc6", 4096).relu()
        x = dense(self.tensors, x, "fc7", 4096).relu()
        return dense(self.tensors, x, "fc8", IMAGENET_CLASSES), outputs


def conv2d(tensors, x, name, size, width, stride=1):
    """Convolve x [N, C, H, W], padded so that stride 1 keeps its size."""
    kernel = tensors.get(f"{name}/kernel", (size, size, x.shape[1], width)).permute(3, 2, 0, 1)  # HWIO -> OIHW
    return F.conv2d(x, kernel, stride=stride, padding=(size - 1) // 2)


def dense(tensors, x, name, width):
    """Apply a fully-connected layer to x [N, C]."""
    return x @ tensors.get(f"{name}/kernel", (x.shape[1], width)) + tensors.get(f"{name}/bias", (width,))


def channels(x):
    """Shape a vector for broadcasting against [N, C, H, W]."""
    return x.view(1, -1, 1, 1)


@torch.no_grad()
def evaluate(network, images):
    """Return the golden values of evaluation, and the names of what the network asked for."""
    logits, outputs = network(images)
    return {
        "param_names": "\n".join(network.tensors.names(stats=False)),
        "stats_names": "\n".join(network.tensors.names(stats=True)),
        "eval/logits": logits,
        "eval/norms": [output.norm().item() for output in outputs],
        "eval/samples": [sample(output.permute(0, 2, 3, 1).numpy()) for output in outputs],
    }


def train_step(network, images, labels):
    """Return the golden values of one forward and backward pass of a network that has been evaluated."""
    names = network.tensors.names(stats=False)
    params = open_relus(make_tensors({name: tuple(network.tensors[name].shape) for name in names}))
    params = {name: torch.from_numpy(value).double().requires_grad_() for name, value in params.items()}
    network.tensors.update(params)
    network.train = True
    logits, _ = network(images)
    loss = F.cross_entropy(logits, labels)
    grads = [grad.numpy() for grad in torch.autograd.grad(loss, [params[name] for name in names])]
    return {
        "train/logits": logits.detach(),
        "train/loss": loss.detach(),
        "train/grad_norms": [np.linalg.norm(grad) for grad in grads],
        "train/grad_samples": [sample(grad) for grad in grads],
    }


def to_torch(images):
    """Convert images [N, H, W, 3] to float64 [N, 3, H, W]."""
    return torch.from_numpy(images).double().permute(0, 3, 1, 2)


def main():
    """Compute all golden values and store them next to this file."""
    golden = {}
    images = to_torch(make_imagenet_images(RESNET_IMAGE))
    for key, (name, options) in IMAGENET_RESNETS.items():
        network = ResNet(int(name.removeprefix("resnet").removeprefix("plain")), **options)
        golden[key] = evaluate(network, images)
        if key == "resnet50":
            training_images, labels = make_imagenet_training_batch()
            golden[key] |= train_step(network, to_torch(training_images), torch.from_numpy(labels).long())
    images = to_torch(make_imagenet_images(VGG_IMAGE))
    for name in VGGS:
        golden[name] = evaluate(VGG(int(name.removeprefix("vgg"))), images)
    arrays = {}
    for key, values in golden.items():
        for name, value in values.items():
            value = np.asarray(value)
            # float32 halves the file
            arrays[f"{key}/{name}"] = value if value.dtype.kind == "U" else value.astype(np.float32)
    np.savez_compressed(Path(__file__).parent / "imagenet.npz", **arrays)


if __name__ == "__main__":
    main()
