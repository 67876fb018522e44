"""What is not finite, out of range, empty or constant is refused, stops a run, or leaves finite numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_folders import write_folder

from resnet_jax import gradients, steps
from resnet_jax.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from resnet_jax.data import Dataset, Split
from resnet_jax.data.inputs import describe_inputs, load_data
from resnet_jax.data.sources.image_folder import load_image_folder
from resnet_jax.data.types import Batch, Inputs, Preprocessing
from resnet_jax.errors import BrokenDataError, DivergedError, UserError
from resnet_jax.evaluate import evaluate
from resnet_jax.gradients import cross_entropy
from resnet_jax.inference.predict import Probabilities
from resnet_jax.models import BatchNorm, ResNet, cifar_resnet
from resnet_jax.models.stacking import init_variables
from resnet_jax.optim import sgd
from resnet_jax.run.checkpoint import restore
from resnet_jax.run.records import read_records
from resnet_jax.run.saved import saved_steps
from resnet_jax.run.workdir import load_inputs
from resnet_jax.steps import create_train_state, finite_parts, make_train_step
from resnet_jax.trainer import Trainer
from resnet_jax.training import train

NAN, INF = float("nan"), float("inf")


def random_split(count: int, seed: int) -> Split:
    random = np.random.RandomState(seed)
    return Split(
        random.randint(0, 256, (count, 8, 8, 3)).astype(np.uint8), random.randint(0, 3, count).astype(np.int32)
    )


DATASET = Dataset("random", random_split(29, seed=0), random_split(11, seed=1), ("red", "green", "blue"))


class Tiny(nn.Module):
    """BN and a matrix: compiled in a moment."""

    num_classes: int
    bn_group_size: int
    conv_general_dilated: Any = None
    trainable = None

    @nn.compact
    def __call__(self, images, *, train):
        x = BatchNorm(group_size=self.bn_group_size)(images, train=train)
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1))


@pytest.fixture(autouse=True)
def dataset(monkeypatch):
    """Stand in for every data set in memory."""

    def load(name, data_dir, **options):
        return load_image_folder(name, data_dir) if name == "folder" else DATASET

    for module in ("inputs", "sources"):
        monkeypatch.setattr(f"resnet_jax.data.{module}.load_dataset", load)


@pytest.fixture
def tiny(monkeypatch):
    """Stand in for every network."""
    for module in ("trainer", "inference.load"):
        monkeypatch.setattr(
            f"resnet_jax.{module}.build_model", lambda config, num_classes: Tiny(num_classes, config.bn_group_size)
        )
    monkeypatch.setattr("resnet_jax.trainer.check_bn_groups", lambda *_: None)


def make_config(workdir, *, model=None, data=None, optim=None, **run) -> Config:
    return Config(
        model=ModelConfig(**{"depth": 8, "bn_group_size": 4, **(model or {})}),
        data=DataConfig(**{"batch_size": 8, "eval_batch_size": 12, "padding": 4, **(data or {})}),
        optim=OptimConfig(**{"learning_rate": 0.05, "boundaries": (), **(optim or {})}),
        run=RunConfig(
            **{"workdir": str(workdir), "steps": 8, "log_every": 8, "eval_every": 8, "save_every": 2, "keep": 9, **run}
        ),
    )


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(np.asarray(leaf)).all()


def assert_only_step_2_is_saved_and_all_is_finite(workdir, config):
    assert saved_steps(workdir) == [2]
    trainer = Trainer(config, load_inputs(workdir), load_data(config))
    assert_finite(restore(workdir, trainer.abstract_state()))
    for record in read_records(workdir):
        assert_finite([value for value in record.values() if isinstance(value, float)])


def make_explosive(value):
    """A function that is zero everywhere, with the derivative `value`."""

    @jax.custom_vjp
    def explosive(x):
        return jnp.zeros_like(x)

    explosive.defvjp(lambda x: (explosive(x), None), lambda _, g: (jnp.where(g == 0, 0.0, value),))
    return explosive


def poison(monkeypatch, what, value, *, at=4):
    """Make the images, the gradient alone, or what the update leaves in a part of the state not finite in step `at`."""
    make, loss, now = steps.make_train_step, gradients.cross_entropy, []

    @dataclasses.dataclass(frozen=True, eq=False)
    class Poisoned(steps.TrainStep):
        def __call__(self, state, batch):
            now[:] = [state.step == at - 1]
            if what == "loss":
                batch = batch._replace(images=jnp.where(now[0], value, batch.images))
            after, report = super().__call__(state, batch)
            if what in ("params", "batch_stats", "opt_state"):
                part = jax.tree.map(lambda x: jnp.where(now[0], value, x) if x.ndim else x, getattr(after, what))
                after = dataclasses.replace(after, **{what: part})
            return after, report

    def make_poisoned(*args, **options):
        return Poisoned(**vars(make(*args, **options)))

    def poisoned_loss(logits, labels, *smoothing):
        losses = loss(logits, labels, *smoothing)
        if what == "gradient" and smoothing:  # in training
            losses += jnp.where(now[0], make_explosive(value)(logits[:, 0]), 0.0)
        return losses

    monkeypatch.setattr("resnet_jax.trainer.make_train_step", make_poisoned)
    monkeypatch.setattr("resnet_jax.gradients.cross_entropy", poisoned_loss)


# Every one with a checkpoint due at the step itself, 4.
@pytest.mark.parametrize(
    ("what", "value", "run", "optim", "message"),
    [
        ("loss", NAN, {}, {}, "the loss is nan at step 4"),
        ("gradient", INF, {}, {"accumulation_steps": 2}, "the gradient is (inf|nan) at step 4"),
        ("params", INF, {"steps_per_dispatch": 1}, {}, "the parameters overflowed in step 4"),
        ("batch_stats", INF, {}, {}, "the running statistics of BN overflowed in step 4"),
        ("opt_state", INF, {}, {}, "the state of the optimizer overflowed in step 4"),
    ],
)
def test_what_is_not_finite_stops_the_run_and_is_not_saved(
    tmp_path, monkeypatch, tiny, what, value, run, optim, message
):
    config = make_config(tmp_path / "run", optim=optim, **run)
    poison(monkeypatch, what, value)
    with pytest.raises(DivergedError, match=f"^{message}; the last good checkpoint is step 2 in .*checkpoints;"):
        train(config)
    assert_only_step_2_is_saved_and_all_is_finite(tmp_path / "run", config)


STREAMED = {"name": "folder", "image_size": 8, "shorter_side": (8, 12), "workers": 0, "mean": (0.5, 0.5, 0.5)}


def test_the_same_with_streamed_images(tmp_path, monkeypatch, tiny):
    write_folder(tmp_path / "images", classes=3, images=4, test_images=2, side=12)
    config = make_config(tmp_path / "run", data={**STREAMED, "dir": str(tmp_path / "images")})
    poison(monkeypatch, "gradient", NAN)
    with pytest.raises(DivergedError, match="^the gradient is nan at step 4; the last good checkpoint is step 2 in "):
        train(config)
    assert_only_step_2_is_saved_and_all_is_finite(tmp_path / "run", config)


def test_an_overflow_between_two_checkpoints_is_found_by_the_next_step(tmp_path, monkeypatch, tiny):
    poison(monkeypatch, "params", INF, at=3)
    with pytest.raises(DivergedError, match="the loss is nan at step 4; the last good checkpoint is step 2 "):
        train(make_config(tmp_path / "run"))


def test_a_checkpoint_whose_next_step_is_not_finite_is_not_called_good(tmp_path, monkeypatch, tiny):
    poison(monkeypatch, "loss", NAN)
    with pytest.raises(DivergedError, match="at step 4; there is no good checkpoint yet in "):
        train(make_config(tmp_path / "run", save_every=3))
    with pytest.raises(DivergedError, match="at step 4; there is no good checkpoint yet in "):
        train(make_config(tmp_path / "run", save_every=3))  # begins with the checkpoint of step 3
    assert saved_steps(tmp_path / "run") == [3]


def test_updates_that_overflow_by_themselves(tmp_path, tiny):
    # Two good steps, then updates of 3e38 times more than 10.
    optim = {"warmup": "steps", "warmup_steps": 2, "warmup_learning_rate": 1e-4, "learning_rate": 3e38}
    optim |= {"weight_decay": 100.0}
    with pytest.raises(DivergedError, match="^the parameters overflowed in step 3; the last good checkpoint is step 2"):
        train(make_config(tmp_path / "run", optim=optim, save_every=1))


def test_the_infinite_scalar_of_a_schedule_is_no_overflow():
    state = create_train_state(sgd(lambda step: 0.1), {"params": {"kernel": jnp.ones(2)}})
    state = dataclasses.replace(state, opt_state=(state.opt_state, jnp.float32(INF)))  # reduce_on_plateau's best so far
    assert all(finite_parts(state).values())
    assert not finite_parts(dataclasses.replace(state, opt_state=jnp.array([INF])))["state of the optimizer"]


def test_an_evaluation_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path, monkeypatch, tiny):
    def poisoned(state, batch, model):
        return dataclasses.replace(steps.eval_step(state, batch, model=model), loss=jnp.full(3, NAN))

    monkeypatch.setattr("resnet_jax.trainer.eval_step", poisoned)
    with pytest.raises(DivergedError, match="the test loss is nan after step 4; the last good checkpoint is step 2 "):
        train(make_config(tmp_path / "run", eval_every=4))
    assert saved_steps(tmp_path / "run") == [2]
    assert [record["kind"] for record in read_records(tmp_path / "run")] == ["start", "train", "train"]


def test_test_images_none_of_which_can_be_read(tmp_path, tiny):
    write_folder(tmp_path / "images", classes=3, images=4, test_images=1, side=12)
    for path in (tmp_path / "images" / "val").rglob("*.jpg"):
        path.write_bytes(b"")
    config = make_config(tmp_path / "run", data={**STREAMED, "dir": str(tmp_path / "images")}, steps=1)
    with pytest.raises(BrokenDataError, match="none of the test images can be read: .* data check .*/images"):
        train(config)


def test_a_network_that_gives_nan_is_not_given_an_error(tmp_path, monkeypatch, tiny):
    train(make_config(tmp_path / "run", steps=1))
    nothing = Probabilities(np.full((11, 3), NAN), {})
    monkeypatch.setattr("resnet_jax.evaluate.probabilities", lambda *args, **options: nothing)
    with pytest.raises(DivergedError, match="run: the outputs of the network of step 1 are not finite"):
        evaluate([tmp_path / "run"])


def test_more_steps_than_a_position_can_count_are_refused(tmp_path):
    with pytest.raises(UserError, match="--run.steps 268435456 of 8 images are 2,147,483,648, beyond"):
        load_data(make_config(tmp_path, steps=2**28))
    assert load_data(make_config(tmp_path, steps=2**28 - 1))


def test_black_images_are_trained_on():
    model = ResNet("cifar", "basic", (1, 1), (4, 8), 3, "A", bn_group_size=4, dtype=jnp.dtype("bfloat16"))
    batch = Batch(jnp.zeros((8, 8, 8, 3)), jnp.arange(8) % 3, jnp.ones(8, bool))
    optimizer = sgd(lambda step: 0.1)
    state = create_train_state(optimizer, init_variables(model, jax.random.key(0), (8, 8, 3)))
    step = jax.jit(make_train_step(model, optimizer, lambda step: 0.1, jax.random.key(1)))
    for _ in range(20):
        state, report = step(state, batch)
        assert_finite(report)
    assert_finite(state)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.batch_stats):
        assert path[-1].key == "mean" or (np.asarray(leaf) >= 0).all()


def test_bn_of_a_single_value_is_refused(tmp_path):
    x = jnp.ones((4, 1, 1, 3))
    layer = BatchNorm(group_size=1)
    variables = layer.init(jax.random.key(0), x, train=False)
    with pytest.raises(ValueError, match=r"BN of a single value: groups of 1 image of \(1, 1\) pixels have no var"):
        layer.apply(variables, x, train=True, mutable=["batch_stats"])
    layer.apply(variables, x, train=False)
    single = make_config(tmp_path, model={"bn_group_size": 1})
    pixel = Inputs((1, 1, 3), ("a", "b"), Preprocessing(np.zeros(3, np.float32), np.ones(3, np.float32)))
    with pytest.raises(UserError, match="images of 1x1 pixels are a single pixel, and BN needs more than one value"):
        Trainer(single, pixel, DATASET)
    Trainer(single, pixel._replace(image_shape=(1, 5, 3)), DATASET)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_large_logits_is_finite_and_right(smoothing):
    logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]])
    labels = jnp.array([1, 0])
    losses = cross_entropy(logits, labels, smoothing)
    # Of the logits below the largest: the mean over classes, and that of the label.
    expected = [(1 - smoothing) * 2e4 + smoothing * 1e4, (1 - smoothing) * 2e4 + smoothing / 3 * 2e4]
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    assert_finite(jax.grad(lambda x: cross_entropy(x, labels, smoothing).sum())(logits))


def test_logits_and_loss_are_float32_with_bfloat16_activations():
    model = cifar_resnet(8, num_classes=3, bn_group_size=4, dtype=jnp.bfloat16)
    optimizer = sgd(lambda step: 0.1)
    step = make_train_step(model, optimizer, lambda step: 0.1, jax.random.key(1))
    batch = Batch(jnp.zeros((8, 8, 8, 3)), jnp.zeros(8, jnp.int32), jnp.ones(8, bool))
    abstract = jax.eval_shape(
        lambda key: create_train_state(optimizer, model.init(key, batch.images, train=False)), jax.random.key(0)
    )
    state, report = jax.eval_shape(step, abstract, batch)
    for leaf in jax.tree.leaves((state.params, state.batch_stats, report)):
        assert leaf.dtype == jnp.float32
    variables = {"params": abstract.params, "batch_stats": abstract.batch_stats}
    logits = jax.eval_shape(lambda v: model.apply(v, batch.images, train=False), variables)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.0] * 3, [1.0, 0.0, 1.0], "the std of the images must be above 0"),
        ([0.0] * 3, [1e-46] * 3, "the std of the images must be above 0"),  # nothing is left of it in float32
        ([0.0] * 3, [NAN, 1.0, 1.0], "the std of the images is not finite"),
        ([NAN, 0.0, 0.0], [1.0] * 3, "the mean of the images is not finite"),
    ],
)
def test_preprocessing_that_would_give_nan_is_refused(tmp_path, mean, std, message):
    with pytest.raises(UserError, match=message):
        describe_inputs(make_config(tmp_path), DATASET, Preprocessing(np.float32(mean), np.float32(std)))
    (tmp_path / "inputs.json").write_text('{"image_shape": [8, 8, 3], "class_names": ["a"]}')
    np.savez(tmp_path / "preprocessing.npz", mean=np.float32(mean), std=np.float32(std))
    with pytest.raises(UserError, match=f"cannot read .* in {tmp_path}: {message}"):
        load_inputs(tmp_path)
