"""examples/minimal.py is a program of its own; it makes the same steps as train.py, so that it cannot rot."""

import ast
import importlib.util
import sys

import jax
import numpy as np
import optax
import pytest
from paths import ROOT

from resnet_jax.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from resnet_jax.data import Dataset, Split
from resnet_jax.data.inputs import describe_inputs
from resnet_jax.optim import build_optimizer, build_schedule
from resnet_jax.trainer import Trainer

SIZES = {
    "data_batch_1": 11,
    "data_batch_2": 10,
    "data_batch_3": 7,
    "data_batch_4": 6,
    "data_batch_5": 5,
    "test_batch": 21,
}
STEPS = 3  # of 16 of 39 images: the third batch straddles two epochs
FILE = ROOT / "examples" / "minimal.py"


@pytest.fixture(scope="module")
def minimal():
    spec = importlib.util.spec_from_file_location("minimal", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def splits(minimal, tmp_path_factory):
    """Made-up images, through files of CIFAR-10's binary version: the label, then a plane of red, green and blue."""
    folder, rng = tmp_path_factory.mktemp("cifar"), np.random.default_rng(0)
    total = sum(SIZES.values())
    images, labels = rng.integers(0, 256, (total, 32, 32, 3), np.uint8), rng.integers(0, 10, total, np.int32)
    start = 0
    for name, size in SIZES.items():
        part = slice(start, start := start + size)
        planes = images[part].transpose(0, 3, 1, 2).reshape(size, -1)
        np.column_stack([labels[part].astype(np.uint8), planes]).tofile(folder / f"{name}.bin")
    train, test = (minimal.read_cifar10(folder, names) for names in (list(SIZES)[:5], ["test_batch"]))
    np.testing.assert_array_equal(np.concatenate([train[0], test[0]]), images)
    np.testing.assert_array_equal(np.concatenate([train[1], test[1]]), labels)
    return train, test


@pytest.fixture
def quick_compilation():
    """Compiling takes longer here than running what is compiled."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def assert_close(ours, theirs, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), ours, theirs)


@pytest.mark.usefixtures("quick_compilation")
def test_first_steps_and_test_error_are_those_of_train(minimal, splits):
    train, test = splits
    config = Config(
        model=ModelConfig(depth=8, bn_group_size=8),
        data=DataConfig(batch_size=16, eval_batch_size=8),
        run=RunConfig(log_every=STEPS),
    )
    dataset = Dataset("made-up", Split(*train), Split(*test), tuple("abcdefghij"))
    trainer = Trainer(config, describe_inputs(config, dataset), dataset)
    state = trainer.initial_state()
    trainer.begin(state)
    first, report = trainer.train(state, 1)
    losses = list(report.history.metrics.loss[:1])
    after_one = jax.device_get((first.params, first.batch_stats))
    state, report = trainer.train(first, STEPS - 1)
    losses += list(report.history.metrics.loss[: STEPS - 1])

    mean = minimal.per_pixel_mean(train[0])
    steps = list(minimal.train(*train, mean, depth=8, steps=STEPS, batch_size=16, group_size=8))
    ours = steps[-1][0]
    assert_close([loss for _, loss in steps], [loss / 16 for loss in losses])
    assert_close((steps[0][0].params, steps[0][0].batch_stats), after_one)
    # A step moves a parameter by about 0.01; where rounding has turned the sign of what is rectified, which depends on
    # the processor, a summand of it comes or goes.
    assert_close((ours.params, ours.batch_stats), (state.params, state.batch_stats), atol=3e-4)
    error = minimal.evaluate(ours, *test, mean, depth=8, batch_size=8)  # of 21 images, the last 3 with padding
    assert error == pytest.approx(trainer.evaluate(state, "test").top1_error)


def test_optimizer_is_that_of_the_paper_at_a_change_of_the_rate(minimal):
    config = OptimConfig()
    schedule = build_schedule(config, 64_000)
    for step in (0, 31_999, 32_000, 47_999, 48_000, 63_999):
        np.testing.assert_allclose(minimal.schedule(step), schedule(step), rtol=1e-6)
    results = []
    for optimizer in (minimal.optimizer, build_optimizer(config, schedule)):
        params = {"kernel": np.float32([1, -2]), "bias": np.float32([3])}
        state = optax.tree.set(optimizer.init(params), count=31_998)
        for step in range(4):
            grads = jax.tree.map(lambda leaf, step=step: leaf * 0.1 + step, params)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        results.append(params)
    assert_close(*results)


def test_example_is_short_and_imports_four_packages():
    text = FILE.read_text()
    assert len(text.splitlines()) <= 200
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    packages = {name.partition(".")[0] for name in imported}
    assert packages - sys.stdlib_module_names == {"jax", "flax", "optax", "numpy"}
