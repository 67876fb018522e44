"""Train a CIFAR network by the paper's recipe in PyTorch: python -m benchmarks.learning DIR OUT.jsonl.

What it learns is to be compared with the records of train.py: nothing of its network, optimizer, shuffling or
augmentation is shared with this package, which only reads the images. DIR holds cifar-10-batches-bin.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import torch_peer
from benchmarks.cases import Case
from benchmarks.driver import positive
from resnet_jax.cli.arguments import ArgumentParser, run_command
from resnet_jax.data.sources.cifar10 import load_cifar10
from resnet_jax.data.types import Split
from resnet_jax.parallel.devices import processor

_BATCH, _PADDING = 128, 4
_LOG_EVERY, _EVALUATE_EVERY = 200, 2_000


def main(args: Sequence[str]) -> int:
    """Train, and write records of the training and the test error as train.py has them in metrics.jsonl."""
    parser = ArgumentParser(prog="python -m benchmarks.learning", description=__doc__, allow_abbrev=False)
    parser.add_argument("dir", type=Path, metavar="DIR", help="folder of CIFAR-10")
    parser.add_argument("out", type=Path, metavar="OUT", help="file of records to write")
    parser.add_argument("--depth", type=positive(int), default=20, help="6n+2 (default 20)")
    parser.add_argument("--bn-group-size", type=positive(int), default=64, help="images of BN (default 64)")
    parser.add_argument("--steps", type=positive(int), default=64_000, help="default 64,000")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--threads", type=positive(int), help="of PyTorch on a CPU")
    options = parser.parse_args(args)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with options.out.open("w") as file:

        def log(**record: object) -> None:
            line = json.dumps(record)
            print(line, file=file, flush=True)
            print(line, flush=True)

        settings = {name: getattr(options, name) for name in ("depth", "bn_group_size", "steps", "seed")}
        name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
        log(kind="start", step=0, torch=torch.__version__, device=name, **settings)
        for record in train(options.dir, device, **settings):
            log(**record)
    return 0


def train(
    folder: Path, device: torch.device, *, depth: int, bn_group_size: int, steps: int, seed: int
) -> Iterator[dict[str, object]]:
    """Train by Sec. 4.2 and yield records: errors in %, losses in nats."""
    data = load_cifar10(folder)
    mean = data.train.images.mean(0) / 255
    (images, labels), test = (_tensors(split, mean, device) for split in (data.train, data.test))
    network = torch_peer.build(Case("cpu", f"resnet{depth}", "train", _BATCH, "float32", ())).to(device)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [32_000, 48_000])
    random = np.random.default_rng(seed)
    totals, began = np.zeros(3), time.perf_counter()
    for step, indices in zip(range(1, steps + 1), _indices(len(labels), random), strict=False):
        batch, target = _augmented(images[indices], random), labels[indices]
        network.train()
        groups = batch.contiguous(memory_format=torch.channels_last).split(bn_group_size)
        logits = torch.cat([network(group) for group in groups])
        loss = functional.cross_entropy(logits, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        totals += [loss.item() * len(target), (logits.argmax(1) != target).sum().item(), len(target)]
        if step % _LOG_EVERY == 0:
            seconds = round(time.perf_counter() - began, 1)
            yield _record("train", step, totals) | {"seconds": seconds}
            totals[:] = 0
        if step % _EVALUATE_EVERY == 0 or step == steps:
            yield _record("test", step, _evaluate(network, *test))


def _tensors(split: Split, mean: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    images = (split.images / 255 - mean).astype(np.float32).transpose(0, 3, 1, 2)
    labels = split.labels.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(images)).to(device), torch.from_numpy(labels).to(device)


def _indices(images: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    while True:
        order = random.permutation(images)
        yield from order[: images // _BATCH * _BATCH].reshape(-1, _BATCH)


def _augmented(images: Tensor, random: np.random.Generator) -> Tensor:
    """Pad, crop and mirror each image by itself."""
    count, side = len(images), images.shape[-1]
    rows, columns = random.integers(0, 2 * _PADDING + 1, (2, count, 1)) + np.arange(side)
    mirrored = random.random((count, 1)) < 0.5
    columns = np.where(mirrored, columns[:, ::-1], columns)
    padded = functional.pad(images, (_PADDING,) * 4)
    return padded[np.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


@torch.inference_mode()
def _evaluate(network: nn.Module, images: Tensor, labels: Tensor) -> np.ndarray:
    network.eval()
    totals = np.zeros(3)
    for batch, target in zip(images.split(500), labels.split(500), strict=True):
        logits = network(batch)
        loss = functional.cross_entropy(logits, target, reduction="sum").item()
        totals += [loss, (logits.argmax(1) != target).sum().item(), len(target)]
    return totals


def _record(kind: str, step: int, totals: np.ndarray) -> dict[str, object]:
    loss, wrong, count = totals
    return {"kind": kind, "step": step, "loss": loss / count, "error": 100 * wrong / count, "images": int(count)}


if __name__ == "__main__":
    run_command(main)
