"""Runs of seconds on a made-up data set, for the tests of what surrounds the training steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from resnet_jax.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from resnet_jax.data import Dataset, Split
from resnet_jax.run.checkpoint import restore
from resnet_jax.run.workdir import load_inputs
from resnet_jax.steps import TrainState
from resnet_jax.trainer import Trainer


def make_split(count: int, seed: int) -> Split:
    """Images of 3 classes that differ in colour, with noise."""
    random = np.random.RandomState(seed)
    labels = random.randint(0, 3, count).astype(np.int32)
    images = random.randint(0, 120, (count, 8, 8, 3))
    images[np.arange(count), :, :, labels] += 80
    return Split(images.astype(np.uint8), labels)


TINY = Dataset("tiny", make_split(101, seed=0), make_split(53, seed=1), ("red", "green", "blue"))


@contextlib.contextmanager
def tiny_dataset() -> Iterator[None]:
    """Stand in for every data set."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("inputs", "sources"):
            patch.setattr(f"resnet_jax.data.{module}.load_dataset", lambda name, data_dir, **options: TINY)
        yield


def make_config(workdir: Path, *, optim: dict[str, Any] | None = None, **run: Any) -> Config:
    """A run of 12 steps that logs every 5, evaluates every 6 and saves every 4."""
    return Config(
        model=ModelConfig(depth=8, bn_group_size=8),
        data=DataConfig(batch_size=16, eval_batch_size=20, padding=1),
        optim=OptimConfig(**{"learning_rate": 0.05, "boundaries": (10,), **(optim or {})}),
        run=RunConfig(
            **{"workdir": str(workdir), "steps": 12, "log_every": 5, "eval_every": 6, "save_every": 4, **run}
        ),
    )


def saved_state(workdir: Path, config: Config, step: int | None = None) -> TrainState:
    """The checkpoint of a step, or the last, on the host."""
    trainer = Trainer(config, load_inputs(workdir), TINY)
    return jax.device_get(restore(workdir, trainer.abstract_state(), step))


def assert_same_bits(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out of records what differs between equal runs."""
    changing = {"time", "images_per_second", "compile_seconds"}
    return [{k: v for k, v in record.items() if k not in changing} for record in records if record["kind"] != "start"]
