"""One seed gives the same bits: twice in a process, in another one, and from the cache of compiled programs.

That neither resuming, the steps in a dispatch nor worker processes change a bit is tested in test_training.py,
test_steps.py, test_streamed_training.py and test_crash.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_folders import write_folder
from paths import ROOT

from resnet_jax.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from resnet_jax.data import Dataset, Split, load_dataset
from resnet_jax.data.resident import ResidentData, Sampler
from resnet_jax.data.tools.statistics import compute_statistics, save_statistics
from resnet_jax.data.types import Inputs, Preprocessing
from resnet_jax.models import abstract_variables, build_model
from resnet_jax.optim import build_optimizer, build_schedule
from resnet_jax.run.checkpoint import restore
from resnet_jax.run.records import read_records
from resnet_jax.run.workdir import load_config, load_inputs
from resnet_jax.steps import create_train_state, make_train_step, make_train_steps
from resnet_jax.trainer import Trainer
from resnet_jax.training import train


def saved_leaves(workdir: Path) -> list[np.ndarray]:
    """Parameters, statistics, optimizer state and step of the last checkpoint."""
    config = load_config(workdir)
    trainer = Trainer(config, load_inputs(workdir), load_dataset(config.data.name, config.data.dir))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restore(workdir, trainer.abstract_state()))]


def timeless_records(workdir: Path) -> list[dict]:
    changing = {"time", "images_per_second", "compile_seconds"}
    return [{k: v for k, v in record.items() if k not in changing} for record in read_records(workdir)]


def assert_same_run(a: Path, b: Path) -> None:
    for ours, theirs in zip(saved_leaves(a), saved_leaves(b), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.tobytes() == theirs.tobytes()  # also -0.0 and 0.0 are not the same
    assert timeless_records(a) == timeless_records(b)
    for name in ("inputs.json", "preprocessing.npz"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_folder(folder, classes=3, images=8, test_images=3, side=24)
    save_statistics(compute_statistics(load_dataset("folder", folder).train, 16, workers=0), folder)
    return folder


@pytest.mark.slow
def test_streamed_images_twice_from_one_seed(tmp_path, folder):
    data = DataConfig(
        name="folder",
        dir=str(folder),
        batch_size=8,
        eval_batch_size=8,
        validation_size=4,
        image_size=16,
        shorter_side=(16, 24),
        lighting=0.1,
        workers=2,  # which is first must not matter
    )
    for name in ("one", "two"):
        run = RunConfig(workdir=str(tmp_path / name), steps=6, log_every=2, eval_every=6, save_every=6)
        train(Config(ModelConfig(depth=8, bn_group_size=4), data, OptimConfig(0.05, boundaries=(3,)), run))
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_another_seed_gives_other_weights_another_order_and_other_crops(tmp_path):
    inputs = Inputs((8, 8, 3), ("a", "b"), Preprocessing(np.zeros(3, np.float32), np.ones(3, np.float32)))
    images = np.arange(100, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 8, 8, 3), np.uint8)
    split = Split(images, np.arange(100, dtype=np.int32))

    def begin(seed: int):
        """The first weights, and the first batch: which images, and where their windows lie."""
        run = RunConfig(seed=seed, log_every=1)
        config = Config(ModelConfig(depth=8, bn_group_size=4), DataConfig(batch_size=64), run=run)
        trainer = Trainer(config, inputs, Dataset("numbered", split, split, inputs.class_names))
        assert isinstance(trainer.data, ResidentData)
        sampler, on_device = trainer.data.sampler, (jnp.array(images), jnp.arange(100))
        batch = jax.jit(lambda: sampler.sample(on_device, jnp.int32(0), sampler.orders(jnp.int32(0))))()
        kernels = [leaf for leaf in jax.tree.leaves(trainer.initial_state().params) if leaf.ndim > 1]
        return kernels, batch.labels, np.asarray(batch.images[..., 0] > 0).reshape(64, -1)

    one, other = begin(0), begin(1)
    assert all((ours != theirs).all() for ours, theirs in zip(one[0], other[0], strict=True))
    assert (one[1] != other[1]).mean() > 0.9
    assert (one[2] != other[2]).any(1).mean() > 0.8


@pytest.mark.slow
def test_another_process_gives_the_same_bits_with_a_cold_and_with_a_warm_cache(tmp_path):
    overrides = (
        "--run.steps 6 --run.log-every 2 --run.save-every 6 --run.eval-every 6 --model.depth 8"
        " --model.bn-group-size 8 --data.batch-size 16 --data.validation-size 100 --data.flip"
    )
    cache = tmp_path / "cache"
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(name: str) -> set[str]:
        """Train in a process of its own; return the compiled programs in the cache."""
        command = [sys.executable, "train.py", "configs/digits_resnet20.py", "--run.workdir", str(tmp_path / name)]
        subprocess.run([*command, *overrides.split()], cwd=ROOT, env=environment, check=True, capture_output=True)
        return {path.name for path in cache.iterdir() if path.name.endswith("-cache")}

    programs = run("cold")
    assert any("train_steps" in program for program in programs)
    assert run("warm") == programs  # nothing was compiled anew
    assert_same_run(tmp_path / "cold", tmp_path / "warm")


@pytest.mark.parametrize(("family", "depth"), [("cifar", 8), ("imagenet", 18), ("vgg", 16)])
def test_what_is_not_deterministic_on_a_gpu(family, depth):
    """XLA has no deterministic select-and-scatter for --xla_gpu_deterministic_ops: max pools do without."""
    config = Config(ModelConfig(family, depth, bn_group_size=4))
    model = build_model(config.model, num_classes=3)
    schedule = build_schedule(config.optim, steps=2)
    optimizer = build_optimizer(config.optim, schedule, model.trainable)
    zeros = Preprocessing(np.zeros(3, np.float32), np.ones(3, np.float32))
    sampler = Sampler(jax.random.key(0), zeros, batch_size=4, num_images=9, padding=4, flip=True)
    train_steps = make_train_steps(make_train_step(model, optimizer, schedule, jax.random.key(1)), sampler)
    state = jax.eval_shape(lambda v: create_train_state(optimizer, v), abstract_variables(model, (32, 32, 3)))
    split = jax.ShapeDtypeStruct((9, 32, 32, 3), np.uint8), jax.ShapeDtypeStruct((9,), np.int32)
    orders = jax.eval_shape(sampler.orders, jnp.int32(0))
    program = (
        jax.jit(train_steps).trace(state, split, orders, jnp.int32(1)).lower(lowering_platforms=("cuda",)).as_text()
    )
    assert "stablehlo.select_and_scatter" not in program
    # Additions to one place in an order that varies: none but one logit of each image, for the loss and its gradient.
    scatters = re.findall(r"stablehlo\.scatter\"?\(.*", program)
    assert scatters
    several = [line for line in scatters if "unique_indices = true" not in line]
    assert all("scatter_dims_to_operand_dims = [1]" in line for line in several), several
