"""One step: its loss, and its batch in parts; many steps in one dispatch: the same bits as one at a time."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax import trainer as trainer_module
from resnet_jax.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from resnet_jax.data import Dataset, Split
from resnet_jax.data.inputs import balanced_weights, describe_inputs
from resnet_jax.data.types import Batch
from resnet_jax.gradients import cross_entropy, split_batch
from resnet_jax.models import cifar_resnet
from resnet_jax.models.stacking import init_variables
from resnet_jax.optim import sgd
from resnet_jax.steps import create_train_state, eval_step, make_train_step
from resnet_jax.trainer import Trainer

RANDOM = np.random.RandomState(0)
SPLIT = Split(RANDOM.randint(0, 256, (29, 8, 8, 3)).astype(np.uint8), RANDOM.randint(0, 3, 29).astype(np.int32))
DATASET = Dataset("random", SPLIT, SPLIT, ("red", "green", "blue"))
CONFIG = Config(
    model=ModelConfig(depth=8, bn_group_size=4),
    data=DataConfig(batch_size=8, eval_batch_size=12, padding=1),
    optim=OptimConfig(learning_rate=0.05, boundaries=(6,), warmup="error", warmup_error=60.0),
    run=RunConfig(log_every=9),
)


def make_trainer(config):
    return Trainer(config, describe_inputs(config, DATASET), DATASET)


@pytest.fixture(scope="module")
def trainer():
    return make_trainer(CONFIG)


@pytest.fixture(scope="module")
def counting():
    """As on an accelerator: the loop always makes the same number of steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "counts_steps", lambda: True)
        return make_trainer(CONFIG)


def run(trainer, *counts):
    """The state and the history after dispatches of so many steps."""
    state, histories = trainer.initial_state(), []
    trainer.data.begin(0)
    for count in counts:
        state, report = trainer.train(state, count)
        assert report.steps == count
        histories.append(jax.tree.map(lambda entries, n=count: np.asarray(entries[:n]), report.history))
    return jax.device_get(state), jax.tree.map(lambda *parts: np.concatenate(parts), *histories)


@pytest.mark.parametrize("counts", [(9,), (4, 5), (1, 7, 1)])
def test_k_steps_leave_the_bits_of_single_steps(trainer, counts):
    jax.tree.map(np.testing.assert_array_equal, run(trainer, *counts), run(trainer, *[1] * 9))


@pytest.mark.parametrize("counts", [(9,), (4, 5), (1, 7, 1)])
def test_a_counted_loop_makes_no_more_steps_than_it_is_told(trainer, counting, counts):
    program = counting.train_program.lower(counting.initial_state(), *counting.data.begin(0)).compile().as_text()
    assert 'known_trip_count":{"n":"9"}' in program
    found = run(counting, *counts)
    jax.tree.map(np.testing.assert_array_equal, found, run(counting, *[1] * 9))
    # Another program than the one on a CPU; a step on 8 images of 8x8 pixels makes 1e-7 a few times larger.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), found, run(trainer, 9))


@pytest.mark.parametrize(
    ("log_every", "steps_per_dispatch", "steps"),
    [(100, None, 20), (50, None, 17), (97, None, 20), (9, None, 9), (50, 30, 30), (9, 30, 9)],
)
def test_dispatches_of_a_counted_loop_fill_the_interval_of_the_log(monkeypatch, log_every, steps_per_dispatch, steps):
    monkeypatch.setattr(trainer_module, "counts_steps", lambda: True)
    run_config = RunConfig(log_every=log_every, steps_per_dispatch=steps_per_dispatch)
    assert make_trainer(dataclasses.replace(CONFIG, run=run_config)).data.most_steps == steps


def test_the_history_has_every_step(trainer):
    state, history = run(trainer, 9)
    assert state.step == 9
    assert (history.metrics.count == 8).all()
    assert np.allclose(history.learning_rate[:2], 0.01)  # warm-up
    assert len(set(history.metrics.loss)) == 9


def test_no_more_steps_than_are_prepared(trainer):
    state, report = trainer.train(trainer.initial_state(), 50)
    assert (report.steps, state.step) == (9, 9)


@pytest.mark.parametrize("counted", [False, True])
def test_nothing_changes_after_a_step_that_is_not_finite(monkeypatch, counted):
    monkeypatch.setattr(trainer_module, "counts_steps", lambda: counted)
    optim = OptimConfig(learning_rate=1e30, boundaries=())
    broken = make_trainer(dataclasses.replace(CONFIG, optim=optim))
    state, report = broken.train(broken.initial_state(), 9)
    assert state.step == report.steps < 9
    finite = np.asarray(report.history.finite)[: int(report.steps)]
    assert not finite[-1]
    assert finite[:-1].all()


def test_evaluation_counts_every_image(trainer):
    state = trainer.initial_state()
    metrics = trainer.evaluate(state, "test")
    np.testing.assert_array_equal(metrics.count, np.bincount(SPLIT.labels))
    other = make_trainer(dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, eval_batch_size=29)))
    at_once = other.evaluate(state, "test")
    np.testing.assert_array_equal(at_once.wrong["error"], metrics.wrong["error"])
    np.testing.assert_allclose(at_once.loss, metrics.loss, rtol=1e-5)


class Linear:
    """A network of one matrix; with `noise` its logits are multiplied by random numbers."""

    bn_group_size = None

    def __init__(self, noise=False):
        self.noise = noise

    def apply(self, variables, images, *, train, mutable=(), rngs=None):
        logits = images @ variables["params"]["kernel"]
        if self.noise:
            logits = logits * jax.random.uniform(rngs["dropout"], logits.shape)
        return (logits, {}) if train else logits


def constant_rate(rate):
    """SGD without momentum and weight decay."""
    schedule = optax.constant_schedule(rate)
    return sgd(schedule, momentum=0.0, weight_decay=0.0), schedule


@pytest.mark.parametrize("parts", [1, 2])
def test_class_weights_by_hand(parts):
    images, labels = RANDOM.normal(size=(4, 5)).astype(np.float32), np.array([0, 2, 1, 1])
    kernel, weights = RANDOM.normal(size=(5, 3)).astype(np.float32), np.array([0.5, 3.0, 0.0])
    batch = Batch(jnp.array(images), jnp.array(labels), jnp.ones(4, bool))
    model, (optimizer, schedule) = Linear(), constant_rate(0.5)
    step = make_train_step(
        model, optimizer, schedule, jax.random.key(0), class_weights=weights, accumulation_steps=parts
    )
    state = create_train_state(optimizer, {"params": {"kernel": jnp.array(kernel)}})
    after, report = jax.jit(step)(state, batch)
    probabilities = np.exp(images @ kernel) / np.exp(images @ kernel).sum(1, keepdims=True)
    gradient = images.T @ (weights[labels, None] * (probabilities - np.eye(3)[labels])) / 4
    np.testing.assert_allclose(after.params["kernel"], kernel - 0.5 * gradient, rtol=1e-4, atol=1e-6)
    losses = -np.log(probabilities)[np.arange(4), labels]
    assert report.metrics.loss == pytest.approx((weights[labels] * losses).sum(), rel=1e-5)
    evaluated = eval_step(state, batch, model=model)
    assert evaluated.loss.sum() == pytest.approx(losses.sum(), rel=1e-5)


@pytest.mark.parametrize("kind", ["none", "balanced"])
def test_a_run_balances_the_classes_of_its_images(kind):
    config = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, class_weights=kind))
    found = make_trainer(config).train_step.compute.keywords["class_weights"]
    counts = np.bincount(SPLIT.labels)
    assert found is None if kind == "none" else np.allclose(found, 29 / 3 / counts)


def test_balanced_weights():
    labels = np.int32([0, 0, 0, 2, 2, 3])
    split = Split(np.zeros((6, 4, 4, 3), np.uint8), labels)
    weights = balanced_weights(Dataset("x", split, split, tuple("abcd")))
    np.testing.assert_allclose(weights, [2 / 3, 0, 1, 2], rtol=1e-6)
    assert weights[labels].mean() == pytest.approx(1)
    assert [weights[labels][labels == c].sum() for c in (0, 2, 3)] == pytest.approx([2, 2, 2])


def test_label_smoothing_by_hand():
    logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    probable, other = 2 - math.log(math.e**2 + 2), -math.log(math.e**2 + 2)  # log probabilities
    expected = [-(0.8 * probable + 0.1 * other + 0.1 * other), -(0.1 * probable + 0.8 * other + 0.1 * other)]
    assert cross_entropy(logits, jnp.array([0, 0]), 0.3) == pytest.approx(expected, rel=1e-6)
    assert cross_entropy(logits, jnp.array([0, 0])) == pytest.approx([-probable, -other], rel=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_smoothed_loss_is_minimized_and_reported_and_not_that_of_the_evaluation(parts):
    images, labels = RANDOM.normal(size=(4, 5)).astype(np.float32), np.array([0, 2, 1, 1])
    kernel = RANDOM.normal(size=(5, 3)).astype(np.float32)
    batch = Batch(jnp.array(images), jnp.array(labels), jnp.ones(4, bool))
    model, (optimizer, schedule) = Linear(), constant_rate(0.5)
    step = make_train_step(model, optimizer, schedule, jax.random.key(0), label_smoothing=0.3, accumulation_steps=parts)
    state = create_train_state(optimizer, {"params": {"kernel": jnp.array(kernel)}})
    after, report = jax.jit(step)(state, batch)
    probabilities = np.exp(images @ kernel) / np.exp(images @ kernel).sum(1, keepdims=True)
    targets = np.where(np.arange(3) == labels[:, None], 0.8, 0.1)
    gradient = images.T @ (probabilities - targets) / 4
    np.testing.assert_allclose(after.params["kernel"], kernel - 0.5 * gradient, rtol=1e-4, atol=1e-6)
    assert report.metrics.loss == pytest.approx(-(targets * np.log(probabilities)).sum(), rel=1e-5)
    assert report.metrics.count == 4
    assert report.gradient_norm == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    assert report.skipped == 0
    evaluated = eval_step(state, batch, model=model)
    assert evaluated.loss.sum() == pytest.approx(-np.log(probabilities)[np.arange(4), labels].sum(), rel=1e-5)


def test_parts_have_whole_groups_that_are_spread_over_the_batch():
    images, labels = jnp.arange(24).reshape(24, 1), jnp.arange(24)
    parts = split_batch(Batch(images, labels, labels < 0), parts=2, group_size=3)
    first = [0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19, 20]
    assert parts.labels.tolist() == [first, [label + 3 for label in first]]
    assert parts.images.shape == (2, 12, 1)
    np.testing.assert_array_equal(parts.images[..., 0], parts.labels)


def test_each_part_has_its_own_dropout():
    model, (optimizer, schedule) = Linear(noise=True), constant_rate(0.5)
    key = jax.random.key(7)
    batch = Batch(jnp.ones((6, 2)), jnp.zeros(6, jnp.int32), jnp.ones(6, bool))
    state = create_train_state(optimizer, {"params": {"kernel": jnp.ones((2, 3))}}).replace(step=jnp.int32(4))
    of_step = jax.random.fold_in(key, 4)
    for parts, keys in ((1, [of_step]), (2, [jax.random.fold_in(of_step, 0), jax.random.fold_in(of_step, 1)])):
        step = jax.jit(make_train_step(model, optimizer, schedule, key, accumulation_steps=parts))
        _, report = step(state, batch)
        logits = [2 * jax.random.uniform(key, (6 // parts, 3)) for key in keys]
        losses = -jax.nn.log_softmax(jnp.concatenate(logits))[:, 0]
        assert report.metrics.loss == pytest.approx(float(losses.sum()), rel=1e-5)


def train_in_parts(parts, steps=3, **options):
    """The variables after some steps with momentum, and the reports."""
    model = cifar_resnet(8, num_classes=3, bn_group_size=2, **options)
    schedule = optax.constant_schedule(0.05)
    optimizer = sgd(schedule, weight_decay=0.01)
    variables = init_variables(model, jax.random.key(0), (8, 8, 3))
    # Running statistics that are nobody's beginning, so that it matters what they are averaged with.
    stats = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.uniform(jax.random.key(leaf.size), leaf.shape),
                         variables["batch_stats"])  # fmt: skip
    state = create_train_state(optimizer, {**variables, "batch_stats": stats})
    step = jax.jit(make_train_step(model, optimizer, schedule, jax.random.key(1), accumulation_steps=parts))
    random, reports = np.random.RandomState(0), []
    for _ in range(steps):
        images, labels = random.normal(size=(24, 8, 8, 3)).astype(np.float32), random.randint(0, 3, 24)
        state, report = step(state, Batch(jnp.array(images), jnp.array(labels, jnp.int32), jnp.ones(24, bool)))
        reports.append(report)
    return state, reports, stats


@pytest.fixture(scope="module")
def in_one_part():
    return train_in_parts(1)


@pytest.mark.parametrize("parts", [2, 4])
def test_the_number_of_parts_does_not_matter(in_one_part, parts):
    whole, reports, before = in_one_part
    state, others, _ = train_in_parts(parts)
    for name in ("params", "batch_stats"):
        for a, b in zip(jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(whole, name)), strict=True):
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), name
    moved = jax.tree.map(lambda a, b: np.linalg.norm(a - b) > 0.05 * np.linalg.norm(b), whole.batch_stats, before)
    assert all(jax.tree.leaves(moved))  # far more than the tolerance
    for ours, theirs in zip(others, reports, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), ours, theirs)


def test_frozen_bn_does_not_move_in_parts_either():
    state, _, before = train_in_parts(3, steps=1, frozen_bn=True)
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, before)


@pytest.mark.parametrize("weight_decay_on", ["all", "kernels"])
def test_frozen_bn_is_not_decayed_either(weight_decay_on):
    optim = dataclasses.replace(CONFIG.optim, weight_decay=0.1, weight_decay_on=weight_decay_on)
    model = dataclasses.replace(CONFIG.model, frozen_bn=True)
    frozen = make_trainer(dataclasses.replace(CONFIG, model=model, optim=optim))
    before = jax.device_get(frozen.initial_state())
    after = jax.device_get(frozen.train(frozen.initial_state(), 9)[0])
    for name, layer in after.params.items():
        for kind, leaves in layer.items():
            moved = jax.tree.map(lambda new, old: (new != old).any(), leaves, before.params[name][kind])
            assert all(jax.tree.leaves(moved)) == (not (name == "stem_bn" or kind.startswith("bn"))), (name, kind)
    jax.tree.map(np.testing.assert_array_equal, after.batch_stats, before.batch_stats)
