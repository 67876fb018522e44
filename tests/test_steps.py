"""Many steps in one dispatch: the same bits as one at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from resnet_jax.data import Dataset, Split
from resnet_jax.experiment import Experiment, describe_inputs

RANDOM = np.random.RandomState(0)
SPLIT = Split(RANDOM.randint(0, 256, (29, 8, 8, 3)).astype(np.uint8), RANDOM.randint(0, 3, 29).astype(np.int32))
DATASET = Dataset("random", SPLIT, SPLIT, ("red", "green", "blue"))
CONFIG = Config(
    model=ModelConfig(depth=8, bn_group_size=4),
    data=DataConfig(batch_size=8, eval_batch_size=12, padding=1),
    optim=OptimConfig(learning_rate=0.05, boundaries=(6,), warmup="error", warmup_error=60.0),
    run=RunConfig(log_every=9),
)


def experiment_of(config):
    return Experiment(config, describe_inputs(config, DATASET), num_images=len(SPLIT))


@pytest.fixture(scope="module")
def experiment():
    return experiment_of(CONFIG)


def run(experiment, *counts):
    """The state and the history after dispatches of so many steps."""
    state, split, histories = experiment.initial_state(), experiment.put(SPLIT), []
    for count in counts:
        state, report = experiment.train_steps(state, split, jnp.int32(count))
        assert report.steps == count
        histories.append(jax.tree.map(lambda entries, n=count: np.asarray(entries[:n]), report.history))
    return jax.device_get(state), jax.tree.map(lambda *parts: np.concatenate(parts), *histories)


@pytest.mark.parametrize("counts", [(9,), (4, 5), (1, 7, 1)])
def test_k_steps_leave_the_bits_of_single_steps(experiment, counts):
    jax.tree.map(np.testing.assert_array_equal, run(experiment, *counts), run(experiment, *[1] * 9))


def test_the_history_has_every_step(experiment):
    state, history = run(experiment, 9)
    assert state.step == 9
    assert (history.metrics.count == 8).all()
    assert np.allclose(history.learning_rate[:2], 0.01)  # warm-up
    assert len(set(history.metrics.loss)) == 9


def test_no_more_steps_than_are_prepared(experiment):
    state, report = experiment.train_steps(experiment.initial_state(), experiment.put(SPLIT), jnp.int32(50))
    assert (report.steps, state.step) == (9, 9)


def test_the_loop_ends_after_a_step_that_is_not_finite():
    optim = OptimConfig(learning_rate=1e30, boundaries=())
    broken = experiment_of(dataclasses.replace(CONFIG, optim=optim))
    state, report = broken.train_steps(broken.initial_state(), broken.put(SPLIT), jnp.int32(9))
    assert state.step == report.steps < 9
    finite = np.asarray(report.history.finite)[: int(report.steps)]
    assert not finite[-1]
    assert finite[:-1].all()


def test_evaluation_in_one_dispatch_counts_every_image(experiment):
    state = experiment.initial_state()
    metrics = experiment.evaluate(state, experiment.put(SPLIT))
    np.testing.assert_array_equal(metrics.count, np.bincount(SPLIT.labels))
    other = experiment_of(dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, eval_batch_size=29)))
    at_once = other.evaluate(state, other.put(SPLIT))
    np.testing.assert_array_equal(at_once.errors, metrics.errors)
    np.testing.assert_allclose(at_once.loss, metrics.loss, rtol=1e-5)
