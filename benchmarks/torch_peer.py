"""The peers "torch" and "torch-compile": channels_last, SGD, cross-entropy, autocast for bfloat16."""

from __future__ import annotations

import time
from itertools import cycle, islice
from typing import Any

import torch
from torch.nn import functional

from benchmarks import torch_networks
from benchmarks.cases import Case
from benchmarks.peer import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Prepared, UnavailableError


def prepare(case: Case, *, compiled: bool = False) -> Prepared:
    """Make the batches and the network; with `compiled` the first step is run too, since it compiles.

    Raises:
      UnavailableError: a case for the GPU and a PyTorch without one.
    """
    on_gpu = case.platform == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise UnavailableError("no CUDA")
    device = torch.device("cuda" if on_gpu else "cpu")
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
    train = case.kind == "train"
    network: Any = torch_networks.build(case.network, case.num_classes)
    network.train(train).to(device=device, memory_format=torch.channels_last)
    forward = torch.compile(network) if compiled else network
    optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == "bfloat16")
    batches = cycle(pool)

    def train_steps(steps: int) -> None:
        for images, labels in islice(batches, steps):
            optimizer.zero_grad(set_to_none=True)
            with autocast:
                loss = functional.cross_entropy(forward(images), labels)
            loss.backward()
            optimizer.step()

    @torch.inference_mode()
    def inference_steps(steps: int) -> None:
        with autocast:
            for images, _ in islice(batches, steps):
                forward(images)

    def run(steps: int) -> None:
        (train_steps if train else inference_steps)(steps)
        if on_gpu:
            torch.cuda.synchronize()

    compile_seconds = None
    if compiled:
        began = time.perf_counter()
        run(1)
        compile_seconds = time.perf_counter() - began
    settings = {
        "memory format": "channels_last",
        "autocast": "bfloat16" if case.dtype == "bfloat16" else "off",
        "threads": str(torch.get_num_threads()),
    }
    if on_gpu:
        settings["TF32 convolutions"] = str(torch.backends.cudnn.allow_tf32)
        settings["TF32 matrix products"] = str(torch.backends.cuda.matmul.allow_tf32)
        settings["cudnn.benchmark"] = "True"
    peak = torch.cuda.max_memory_allocated if on_gpu else lambda: None
    return Prepared(run, 1, compile_seconds, peak, settings)
