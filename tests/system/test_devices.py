"""The same step on one device and on eight: the groups of BN do not depend on the number of devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT

STEP = """
import dataclasses, json, re, sys
from pathlib import Path
import jax, numpy as np
from resnet_jax.config import Config, DataConfig, ModelConfig
from resnet_jax.data import Dataset, Split
from resnet_jax.data.inputs import describe_inputs
from resnet_jax.data.streamed import HostBatch
from resnet_jax.data.types import StreamedDataset
from resnet_jax.trainer import Trainer

random = np.random.RandomState(0)
split = Split(random.randint(0, 256, (96, 16, 16, 3)).astype(np.uint8), random.randint(0, 10, 96).astype(np.int32))
dataset = Dataset("random", split, split, tuple("0123456789"))
config = Config(model=ModelConfig(depth=8, bn_group_size=8), data=DataConfig(batch_size=64, eval_batch_size=37))
trainer = Trainer(config, describe_inputs(config, dataset), dataset)

def all_reduces(program):
    return re.findall(r"= (\\w+\\[[\\d,]*\\])\\S* all-reduce(?:-start)?\\(", program.as_text())  # such as f32[78042]

trainer.begin(trainer.initial_state())
resident, report = trainer.train(trainer.initial_state(), 1)
metrics = trainer.evaluate(resident, "test")

streamed_set = StreamedDataset("random", Path(), split, split, dataset.class_names)
streaming = Trainer(config, trainer.inputs._replace(lighting=np.eye(3, dtype=np.float32)), streamed_set)
batch = HostBatch(split.images[:64], split.labels[:64], np.full(64, -1, np.int32), np.ones(64, bool))
batch = HostBatch(*(jax.make_array_from_process_local_data(streaming.by_image, array) for array in batch))
step = streaming.train_program.lower(streaming.initial_state(), batch).compile()
streamed, _ = step(streaming.initial_state(), batch)

model = dataclasses.replace(config.model, dtype="bfloat16")
half = Trainer(dataclasses.replace(config, model=model), trainer.inputs, dataset)
half.begin(half.initial_state())

leaves = jax.tree_util.tree_leaves_with_path({"resident": resident, "streamed": streamed})
np.savez(sys.argv[1], **{jax.tree_util.keystr(path): leaf for path, leaf in leaves})
print(json.dumps({"devices": jax.device_count(), "loss": float(report.history.metrics.loss[0]),
                  "eval_loss": metrics.mean_loss, "count": metrics.images,
                  "all_reduces": {"resident": all_reduces(trainer.train_program), "streamed": all_reduces(step),
                                  "bfloat16": all_reduces(half.train_program)}}))
"""


def one_step(devices: int, path: Path) -> dict:
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STEP, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(result.stdout)


def test_one_and_eight_devices_make_the_same_step(tmp_path):
    one, eight = one_step(1, tmp_path / "one.npz"), one_step(8, tmp_path / "eight.npz")
    assert (one["devices"], eight["devices"]) == (1, 8)
    assert one["count"] == eight["count"] == 96
    assert eight["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert eight["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
    assert one["all_reduces"] == {"resident": [], "streamed": [], "bfloat16": []}
    # Not one a layer for BN, nor one an array for the gradients: all parameters, the running statistics, and the sums
    # of the loss, the images and two errors. In float32 also where activations are bfloat16.
    sums = f"f32[{75_290 + 2 * (16 * 3 + 32 * 2 + 64 * 2) + 4}]"
    assert eight["all_reduces"] == {
        "resident": [sums],
        "streamed": ["s32[]", sums],  # and how many images could not be read
        "bfloat16": [sums],
    }
    with np.load(tmp_path / "one.npz") as expected, np.load(tmp_path / "eight.npz") as found:
        assert len(expected) == len(found) == 2 * (1 + 3 * 7 + 2 + 2 * 7 + 3 * 7 + 2 + 1)
        differences = {
            name: np.linalg.norm(found[name] - expected[name]) / max(np.linalg.norm(expected[name]), 1e-20)
            for name in expected
        }
    largest = max(differences, key=differences.get)
    assert differences[largest] <= 1e-6, largest
