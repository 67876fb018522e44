"""The peer "ours": Experiment as train.py uses it, on made-up data."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks import roofline
from benchmarks.cases import Case
from benchmarks.jax_device import peak_device_bytes
from benchmarks.peer import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Prepared
from resnet_jax.parallel import devices as runtime
from resnet_jax.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from resnet_jax.data import Dataset, Split
from resnet_jax.data.types import Preprocessing
from resnet_jax.experiment import Experiment
from resnet_jax.feeds import ResidentFeed
from resnet_jax.data.types import Inputs

_CIFAR_IMAGES = 50_000  # as in training: the order of an epoch is drawn over so many


def make_config(case: Case, *, single: bool, scan_blocks: bool, remat: bool) -> Config:
    """Return the repository's defaults for the case; BN groups of 64 on CIFAR, the whole batch on ImageNet."""
    cifar = case.family == "cifar"
    group_size = 64 if cifar and case.batch_size % 64 == 0 else None
    model = ModelConfig(
        family=case.family,
        depth=case.depth,
        shortcut="A" if cifar else "B",
        bn_group_size=group_size,
        dtype=case.dtype,
        scan_blocks=scan_blocks,
        remat=remat,
    )
    data = DataConfig(batch_size=case.batch_size, eval_batch_size=case.batch_size, padding=4 if cifar else 0)
    optim = OptimConfig(learning_rate=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    return Config(model=model, data=data, optim=optim, run=RunConfig(steps_per_dispatch=1 if single else None))


def prepare(case: Case, *, single: bool = False, scan_blocks: bool = False, remat: bool = False) -> Prepared:
    """Put the data set on the device and compile.

    Args:
      case: what to measure.
      single: dispatch every step by itself, instead of as many at once as train.py does at most.
      scan_blocks, remat: of the model.
    """
    config = make_config(case, single=single, scan_blocks=scan_blocks, remat=remat)
    runtime.configure(config)
    rng = np.random.default_rng(0)
    pool = case.pool_batches * case.batch_size
    num_images = _CIFAR_IMAGES if case.family == "cifar" and case.kind != "inference" else pool
    shape = (case.image_size, case.image_size, 3)
    images = rng.integers(0, 256, (num_images, *shape), np.uint8)
    labels = rng.integers(0, case.num_classes, num_images, np.int32)
    # The mean of uniform bytes, as the per-pixel mean that training takes by default.
    preprocessing = Preprocessing(np.full(shape, 0.5, np.float32), np.ones(3, np.float32))
    inputs = Inputs(shape, tuple(f"class {number}" for number in range(case.num_classes)), preprocessing)
    experiment = Experiment(config, inputs)
    split = Split(images, labels)
    feed = ResidentFeed(experiment, Dataset("made up", split, split, inputs.class_names))
    state = experiment.initial_state()
    settings = {"devices": f"{jax.device_count()} {jax.default_backend()}"}
    if case.kind == "inference":
        return _prepare_inference(case, feed, state, settings)

    began = time.perf_counter()
    feed.begin(state)
    compile_seconds = time.perf_counter() - began
    settings["steps per dispatch"] = str(feed.most_steps)

    def run(steps: int) -> None:
        nonlocal state
        dispatches = [feed.most_steps] * (steps // feed.most_steps)
        if rest := steps % feed.most_steps:
            dispatches.append(rest)
        reports = []
        for count in dispatches:
            state, report = feed.train(state, count)
            reports.append(report.steps)
        jax.block_until_ready(state)
        if sum(map(int, reports)) != steps:  # a loop on the device ends where the loss is not finite
            raise FloatingPointError("the loss is not finite")

    measure = partial(roofline.measure, case, feed.program)
    return Prepared(run, 1, compile_seconds, peak_device_bytes, settings, measure)


def _prepare_inference(case: Case, feed: ResidentFeed, state: Any, settings: dict[str, str]) -> Prepared:
    """Evaluate a split of `pool_batches` batches; a call is one dispatch and returns sums on the host."""

    def run(calls: int) -> None:
        for _ in range(calls):
            feed.evaluate(state, "test")

    seconds = []
    for _ in range(2):  # the first call compiles
        began = time.perf_counter()
        run(1)
        seconds.append(time.perf_counter() - began)
    settings["batches per dispatch"] = str(case.pool_batches)
    return Prepared(run, case.pool_batches, seconds[0] - seconds[1], peak_device_bytes, settings)
