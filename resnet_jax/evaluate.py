"""What a work directory holds: its trained network, and how good that is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from resnet_jax.checkpoint import Checkpoints
from resnet_jax.experiment import Experiment, abstract_state, build_model, build_optimizer, load_data
from resnet_jax.metrics import Metrics
from resnet_jax.models import ResNet
from resnet_jax.workdir import Inputs, check_classes, load_config, load_inputs


class Trained(NamedTuple):
    """A trained network: `model.apply(variables, images, train=False)` gives logits.

    `images` are normalized: `normalize(uint8_images, *inputs.preprocessing)` of resnet_jax.data.augment.
    """

    step: int
    model: ResNet
    variables: dict[str, Any]
    inputs: Inputs


def load_trained(workdir: str | Path, *, step: int | None = None) -> Trained:
    """Load the network of a work directory; the data set is not needed.

    Args:
      workdir: of a run.
      step: of the checkpoint; None for the last one.

    Raises:
      UserError: no work directory or no such checkpoint.
    """
    workdir = Path(workdir)
    config, inputs = load_config(workdir), load_inputs(workdir)
    model = build_model(config.model, len(inputs.class_names))
    optimizer, _ = build_optimizer(config.optim)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = abstract_state(model, optimizer, inputs.image_shape, device)
    state = Checkpoints(workdir, read_only=True).restore(abstract, step)
    return Trained(int(state.step), model, {"params": state.params, "batch_stats": state.batch_stats}, inputs)


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
    checkpoints = Checkpoints(workdir, read_only=True)
    if data_dir is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=data_dir))
    dataset = load_data(config)
    check_classes(inputs, dataset)
    experiment = Experiment(config, inputs, num_images=len(dataset.train))
    state = checkpoints.restore(experiment.abstract_state(), step)
    metrics = experiment.evaluate(state, experiment.put(dataset.test))
    return Evaluation(int(state.step), dataset.class_names, metrics)
