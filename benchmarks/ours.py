"""The peers "ours": Trainer as train.py uses it, on made-up data."""

from __future__ import annotations

import hashlib
import os
import time
from typing import Any

import jax
import numpy as np

from benchmarks.cases import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Case, Prepared
from resnet_jax.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from resnet_jax.data import Dataset, Split
from resnet_jax.data.types import Inputs, Preprocessing
from resnet_jax.parallel import devices
from resnet_jax.trainer import Trainer

_CIFAR_IMAGES = 50_000  # as in training: the order of an epoch is drawn over so many


def prepare(
    case: Case,
    *,
    single: bool = False,
    scan_blocks: bool = False,
    remat: bool = False,
    deterministic: bool = False,
) -> Prepared:
    """Put the data set on the device and compile.

    Args:
      case: what to measure: the defaults of train.py, with BN groups of 64 on CIFAR, the whole batch on ImageNet.
      single: dispatch every step by itself, instead of as many at once as train.py does at most.
      scan_blocks, remat: of the model.
      deterministic: let XLA use only operations on a GPU that give the same bits each time.
    """
    if deterministic:  # before JAX has a device
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    cifar = case.family == "cifar"
    model = ModelConfig(
        family=case.family,
        depth=case.depth,
        shortcut="A" if cifar else "B",
        bn_group_size=64 if cifar and case.batch_size % 64 == 0 else None,
        dtype=case.dtype,
        scan_blocks=scan_blocks,
        remat=remat,
    )
    data = DataConfig(batch_size=case.batch_size, eval_batch_size=case.batch_size, padding=4 if cifar else 0)
    optim = OptimConfig(learning_rate=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    run = RunConfig(steps_per_dispatch=1 if single else None, log_every=100 if cifar else 20)
    config = Config(model=model, data=data, optim=optim, run=run)
    devices.configure(config)
    rng = np.random.default_rng(0)
    count = _CIFAR_IMAGES if cifar and case.mode == "train" else case.pool_batches * case.batch_size
    shape = (case.image_size, case.image_size, 3)
    split = Split(rng.integers(0, 256, (count, *shape), np.uint8), rng.integers(0, case.num_classes, count, np.int32))
    # The mean of uniform bytes, as the per-pixel mean that training takes by default.
    preprocessing = Preprocessing(np.full(shape, 0.5, np.float32), np.ones(3, np.float32))
    inputs = Inputs(shape, tuple(f"class {number}" for number in range(case.num_classes)), preprocessing)
    trainer = Trainer(config, inputs, Dataset("made up", split, split, inputs.class_names))
    state = trainer.initial_state()
    settings = {"devices": f"{jax.device_count()} {jax.default_backend()}"}
    if case.mode == "inference":
        return _prepare_inference(case, trainer, state, settings)

    initial = jax.device_get(state)
    began = time.perf_counter()
    trainer.begin(state)
    compile_seconds = time.perf_counter() - began
    most_steps = trainer.data.most_steps
    settings["steps per dispatch"] = str(most_steps)

    # An accelerator makes all steps of a dispatch even where fewer are asked for.
    steps_per_call = most_steps if case.platform == "gpu" else 1

    def compute(calls: int) -> None:
        nonlocal state
        steps = calls * steps_per_call
        reports = []
        for first in range(0, steps, most_steps):
            state, report = trainer.train(state, min(most_steps, steps - first))
            reports.append(report.steps)
        jax.block_until_ready(state)
        if sum(map(int, reports)) != steps:  # a loop on the device ends where the loss is not finite
            raise FloatingPointError("the loss is not finite")

    def digest(calls: int) -> str:
        nonlocal state
        state = jax.device_put(initial, trainer.replicated)
        trainer.data.begin(0)
        compute(calls)
        return hashlib.sha256(b"".join(x.tobytes() for x in jax.tree.leaves(jax.device_get(state)))).hexdigest()[:16]

    return Prepared(compute, steps_per_call, compile_seconds, peak_device_bytes, settings, digest)


def _prepare_inference(case: Case, trainer: Trainer, state: Any, settings: dict[str, Any]) -> Prepared:
    """Evaluate a split of `pool_batches` batches; a call returns sums on the host."""

    def compute(calls: int) -> None:
        for _ in range(calls):
            trainer.evaluate(state, "test")

    seconds = []
    for _ in range(2):  # the first call compiles
        began = time.perf_counter()
        compute(1)
        seconds.append(time.perf_counter() - began)
    return Prepared(compute, case.pool_batches, seconds[0] - seconds[1], peak_device_bytes, settings)


def peak_device_bytes() -> int | None:
    """Return the peak of the allocator of the first device; None on the CPU, which has no such figure."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
