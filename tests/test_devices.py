"""The same step on one device and on four: the groups of BN do not depend on the number of devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

STEP = """
import json, jax, numpy as np
from resnet_jax.config import Config, DataConfig, ModelConfig
from resnet_jax.data import Dataset, Split
from resnet_jax.experiment import Experiment, describe_inputs

random = np.random.RandomState(0)
split = Split(random.randint(0, 256, (64, 16, 16, 3)).astype(np.uint8), random.randint(0, 10, 64).astype(np.int32))
dataset = Dataset("random", split, split, tuple("0123456789"))
config = Config(model=ModelConfig(depth=8, bn_group_size=8), data=DataConfig(batch_size=32, eval_batch_size=24))
experiment = Experiment(config, describe_inputs(config, dataset), num_images=len(dataset.train))
data = experiment.put(split)
state, report = experiment.train_steps(experiment.initial_state(), data, jax.numpy.int32(1))
metrics = experiment.evaluate(state, data)
norms = {jax.tree_util.keystr(path): float(np.linalg.norm(leaf)) for path, leaf in
         jax.tree_util.tree_leaves_with_path((state.params, state.batch_stats))}
print(json.dumps({"devices": jax.device_count(), "loss": float(report.history.metrics.loss[0]), "norms": norms,
                  "eval_loss": metrics.mean_loss, "count": metrics.images}))
"""


def one_step(devices: int) -> dict:
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STEP]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(result.stdout)


def test_one_and_four_devices_make_the_same_step():
    one, four = one_step(1), one_step(4)
    assert (one["devices"], four["devices"]) == (1, 4)
    assert one["count"] == four["count"] == 64
    assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert four["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
    assert four["norms"] == pytest.approx(one["norms"], rel=1e-5, abs=1e-7)
