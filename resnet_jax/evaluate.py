"""Evaluate the trained network of a work directory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax import runtime
from resnet_jax.checkpoint import Checkpoints
from resnet_jax.experiment import Experiment, load_data
from resnet_jax.metrics import Metrics
from resnet_jax.workdir import check_classes, load_config, load_inputs


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result for one checkpoint: its step, the names of the classes, and the sums by class."""

    step: int
    class_names: tuple[str, ...]
    metrics: Metrics

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: errors in %, loss in nats; a class without images has error None."""
        errors = [None if np.isnan(error) else float(error) for error in self.metrics.class_errors]
        return {
            "step": self.step,
            "top1_error": self.metrics.top1_error,
            "loss": self.metrics.mean_loss,
            "count": self.metrics.images,
            "class_errors": dict(zip(self.class_names, errors, strict=True)),
        }


def evaluate_workdir(workdir: Path, *, data_dir: str | None = None, step: int | None = None) -> Evaluation:
    """Evaluate a checkpoint, single view (Sec. 4.2), on every test image once, over all devices.

    Args:
      workdir: of a run.
      data_dir: where the data set is now, if not where it was.
      step: of the checkpoint; None for the last one.

    Raises:
      UserError: no work directory, no such checkpoint, or no data.
    """
    config, inputs = load_config(workdir), load_inputs(workdir)
    runtime.configure(config)
    checkpoints = Checkpoints(workdir, read_only=True)
    if data_dir is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=data_dir))
    dataset = load_data(config)
    check_classes(inputs, dataset)
    experiment = Experiment(config, inputs, num_images=len(dataset.train))
    state = checkpoints.restore(experiment.abstract_state(), step)
    metrics = experiment.evaluate(state, experiment.put(dataset.test))
    return Evaluation(int(state.step), dataset.class_names, metrics)
