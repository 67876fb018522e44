"""Write cifar_resnet20.npz: golden values of the paper's CIFAR networks, computed by PyTorch in float64.

Written from Sec. 4.2 of the paper, independently of `resnet_jax`; it needs torch and numpy only. To run it,
from the root of the repository:

    python tests/golden/make_torch_golden.py

The stored file was made with Python 3.11.7, torch 2.13.0 (CPU) and numpy 2.4.6. Its keys, for each shortcut
option in {none, A, B, C}; P parameters and S statistics in sorted order of their names, C channels of all
batch norms together:

    A/param_names [P], A/stats_names [S]       slash-separated names, as in a checkpoint
    A/eval/logits [8, 10]                      with the given running statistics
    A/eval/stage{1,2,3}_norm, ..._samples      L2 norm and 32 values (NHWC order) of the output of each stage
    A/groups/logits, A/groups/loss             one training step, batch norm over groups of 4 images
    A/groups/grad_norms [P], ..._samples [P, 32]
    A/groups/mean, var_biased, var_unbiased [C]  running statistics after the step, layers in sorted order
    A/whole/...                                as groups, batch norm over all 8 images; option A only
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from inputs import make_batch, make_tensors, sample

NUM_BLOCKS = 3  # n in depth = 6n + 2: depth 20
WIDTHS = (16, 32, 64)
NUM_CLASSES = 10
EPSILON = 1e-5
DECAY = 0.9  # the share of the old running statistics


def layers(shortcut):
    """Yield (name, kernel shape [H, W, in, out]) of each convolution."""
    yield "stem", (3, 3, 3, WIDTHS[0])
    in_width = WIDTHS[0]
    for stage, width in enumerate(WIDTHS, start=1):
        for block in range(1, NUM_BLOCKS + 1):
            prefix = f"stage{stage}_block{block}"
            yield f"{prefix}/conv1", (3, 3, in_width, width)
            yield f"{prefix}/conv2", (3, 3, width, width)
            if shortcut == "C" or (shortcut == "B" and in_width != width):
                yield f"{prefix}/shortcut", (1, 1, in_width, width)
            in_width = width


def conv_and_bn_names(name):
    """Map a layer of `layers` to the names of its convolution and its batch norm."""
    head, _, last = name.rpartition("/")
    pair = {"conv1": ("conv1", "bn1"), "conv2": ("conv2", "bn2")}.get(last, (f"{last}_conv", f"{last}_bn"))
    return tuple(f"{head}/{part}" if head else part for part in pair)


def shapes_of(shortcut):
    """Return ({parameter name: shape}, {statistic name: shape})."""
    params = {"fc/kernel": (WIDTHS[-1], NUM_CLASSES), "fc/bias": (NUM_CLASSES,)}
    stats = {}
    for name, shape in layers(shortcut):
        conv, bn = conv_and_bn_names(name)
        params[f"{conv}/kernel"] = shape
        params[f"{bn}/scale"] = params[f"{bn}/bias"] = shape[-1:]
        stats[f"{bn}/mean"] = stats[f"{bn}/var"] = shape[-1:]
    return params, stats


class Network:
    """The network as plain arithmetic on a {name: tensor} dict; `group_size` None means evaluation."""

    def __init__(self, shortcut, params, stats, group_size=None):
        self.shortcut, self.params, self.stats, self.group_size = shortcut, params, stats, group_size
        self.batch_stats = {}  # after a training pass: mean over groups of {mean, var_biased, var_unbiased}

    def __call__(self, x):
        """Return (logits, {stage: output [N, C, H, W]}) of images [N, 3, 32, 32]."""
        outputs = {}
        x = self.conv_bn(x, "stem").relu()
        for stage in (1, 2, 3):
            for block in range(1, NUM_BLOCKS + 1):
                # Sec. 4.2: maps of 32, 16 and 8; the first convolution of stages 2 and 3 subsamples.
                x = self.block(x, f"stage{stage}_block{block}", stride=2 if stage > 1 and block == 1 else 1)
            outputs[f"stage{stage}"] = x
        return x.mean((2, 3)) @ self.params["fc/kernel"] + self.params["fc/bias"], outputs

    def block(self, x, prefix, stride):
        """Compute relu(F(x) + shortcut(x)), or relu(F(x)) in a plain network."""
        residual = self.conv_bn(x, f"{prefix}/conv1", stride).relu()
        residual = self.conv_bn(residual, f"{prefix}/conv2")
        if self.shortcut == "none":
            return residual.relu()
        if f"{prefix}/shortcut_conv/kernel" in self.params:
            x = self.conv_bn(x, f"{prefix}/shortcut", stride)
        elif stride != 1:
            x = self.pad_channels(x[:, :, ::stride, ::stride], residual.shape[1] - x.shape[1])
        return (residual + x).relu()

    def pad_channels(self, x, extra):
        """Append `extra` channels of zeros (option A)."""
        return torch.cat([x, x.new_zeros(x.shape[0], extra, *x.shape[2:])], dim=1)

    def conv_bn(self, x, name, stride=1):
        """Convolve without bias, padded by (1, 1) for 3x3 and (0, 0) for 1x1, then normalise."""
        conv, bn = conv_and_bn_names(name)
        kernel = self.params[f"{conv}/kernel"].permute(3, 2, 0, 1)  # HWIO -> OIHW
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        x = self.normalise(x, bn)
        channels = (1, -1, 1, 1)
        return x * self.params[f"{bn}/scale"].view(channels) + self.params[f"{bn}/bias"].view(channels)

    def normalise(self, x, bn):
        """Normalise by the running statistics, or in training by those of each group of images."""
        if self.group_size is None:
            mean, var = (self.stats[f"{bn}/{kind}"].view(1, -1, 1, 1) for kind in ("mean", "var"))
            return (x - mean) / torch.sqrt(var + EPSILON)
        groups = []
        for group in x.split(self.group_size):
            count = group.numel() // group.shape[1]
            mean = group.mean((0, 2, 3), keepdim=True)
            var = ((group - mean) ** 2).mean((0, 2, 3), keepdim=True)  # biased, as all batch norms normalise
            groups.append(((group - mean) / torch.sqrt(var + EPSILON), mean, var, var * count / (count - 1)))
        normalised, *batch_stats = zip(*groups, strict=True)
        for kind, values in zip(("mean", "var_biased", "var_unbiased"), batch_stats, strict=True):
            self.batch_stats[f"{bn}/{kind}"] = torch.stack(values).mean(0).detach().flatten()
        return torch.cat(normalised)


def evaluate(shortcut, params, stats, images):
    """Return the golden values of evaluation."""
    logits, outputs = Network(shortcut, params, stats)(images)
    golden = {"logits": logits}
    for stage, output in outputs.items():
        golden[f"{stage}_norm"] = output.norm()
        golden[f"{stage}_samples"] = sample(output.detach().permute(0, 2, 3, 1).numpy())
    return golden


def train_step(shortcut, params, stats, images, labels, group_size):
    """Return the golden values of one training step: forward, backward, new running statistics."""
    network = Network(shortcut, params, stats, group_size)
    logits, _ = network(images)
    loss = F.cross_entropy(logits, labels)
    names = sorted(params)
    grads = [grad.numpy() for grad in torch.autograd.grad(loss, [params[name] for name in names])]
    golden = {
        "logits": logits,
        "loss": loss,
        "grad_norms": [np.linalg.norm(grad) for grad in grads],
        "grad_samples": [sample(grad) for grad in grads],
    }
    bns = sorted(name.removesuffix("/mean") for name in stats if name.endswith("/mean"))
    for kind in ("mean", "var_biased", "var_unbiased"):
        old = torch.cat([stats[f"{bn}/{kind.split('_')[0]}"] for bn in bns])
        batch = torch.cat([network.batch_stats[f"{bn}/{kind}"] for bn in bns])
        golden[kind] = DECAY * old + (1 - DECAY) * batch
    return golden


def main():
    """Compute all golden values and store them next to this file."""
    images, labels = make_batch()
    images = torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2)
    labels = torch.tensor(labels, dtype=torch.int64)
    golden = {}
    for shortcut in ("none", "A", "B", "C"):
        param_shapes, stats_shapes = shapes_of(shortcut)
        params = {k: torch.tensor(v, dtype=torch.float64) for k, v in make_tensors(param_shapes).items()}
        stats = {k: torch.tensor(v, dtype=torch.float64) for k, v in make_tensors(stats_shapes).items()}
        for param in params.values():
            param.requires_grad_()
        golden[f"{shortcut}/param_names"] = np.array(sorted(params))
        golden[f"{shortcut}/stats_names"] = np.array(sorted(stats))
        parts = {
            "eval": evaluate(shortcut, params, stats, images),
            "groups": train_step(shortcut, params, stats, images, labels, group_size=4),
        }
        if shortcut == "A":
            parts["whole"] = train_step(shortcut, params, stats, images, labels, group_size=8)
        for part, values in parts.items():
            for key, value in values.items():
                value = value.detach().numpy() if torch.is_tensor(value) else np.array(value)
                golden[f"{shortcut}/{part}/{key}"] = value.astype(np.float32)  # float32 halves the file
    np.savez_compressed(Path(__file__).parent / "cifar_resnet20.npz", **golden)


if __name__ == "__main__":
    main()
