"""Evaluate a work directory on the test images of its data set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from resnet_jax.checkpoint import Checkpoints
from resnet_jax.errors import UserError
from resnet_jax.experiment import Experiment, load_data
from resnet_jax.metrics import Metrics
from resnet_jax.workdir import load_config, load_preprocessing


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result for one checkpoint: `step`, names of the classes and the sums by class."""

    step: int
    class_names: tuple[str, ...]
    metrics: Metrics

    def to_dict(self) -> dict[str, object]:
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
    """Evaluate a checkpoint, single view (Sec. 4.2), on every test image once.

    Args:
      workdir: of a run.
      data_dir: where the data set is now, if not where it was.
      step: of the checkpoint; None for the last one.

    Raises:
      UserError: no work directory, no such checkpoint, or no data.
    """
    config = load_config(workdir)
    if data_dir is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=data_dir))
    preprocessing = load_preprocessing(workdir)
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir} has no checkpoint yet")
    checkpoints = Checkpoints(workdir, read_only=True)
    if step is None and (step := checkpoints.latest()) is None:
        raise UserError(f"{workdir} has no checkpoint yet")
    dataset = load_data(config)
    experiment = Experiment(config, dataset, preprocessing)
    state = checkpoints.restore(experiment.abstract_state(), step)
    return Evaluation(step, dataset.class_names, experiment.evaluate(state, experiment.put(dataset.test)))
