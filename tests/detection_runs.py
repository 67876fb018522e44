"""Runs of detection on made-up images that take seconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from resnet_jax.config import Config, DataConfig, DetectionConfig, ModelConfig, OptimConfig, RunConfig


def make_detection_config(
    data_dir: Path,
    workdir: Path,
    *,
    model: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    detection: dict[str, Any] | None = None,
    **run: Any,
) -> Config:
    """A detector with a sixteenth of the filters of ResNet-18, for voc_sets.make_set(): 2 images a step, 4 steps."""
    settings: dict[str, Any] = {
        "shorter_side": 72,
        "longer_side": 96,
        "anchor_scales": (1.0, 2.0),
        "rpn_filters": 16,
        "rpn_samples": 32,
        "train_proposals": (100, 40),
        "test_proposals": (100, 40),
        "min_size": 4.0,
        "regions": 16,
        "pooled_size": 6,
        "background_iou": (0.0, 0.5),
        **(detection or {}),
    }
    return Config(
        model=ModelConfig(
            **{"family": "imagenet", "depth": 18, "width": 0.0625, "shortcut": "B", "bn_group_size": 1, **(model or {})}
        ),
        data=DataConfig(
            name="voc",
            dir=str(data_dir),
            train_sets=("trainval",),
            test_sets=("test",),
            batch_size=2,
            eval_batch_size=2,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            workers=0,
        ),
        optim=OptimConfig(**{"learning_rate": 0.02, "boundaries": (), "weight_decay": 1e-4, **(optim or {})}),
        detection=DetectionConfig(**settings),
        run=RunConfig(**{"workdir": str(workdir), "steps": 4, "log_every": 2, "eval_every": 4, "save_every": 2, **run}),
    )


def with_steps(config: Config, steps: int) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, steps=steps))
