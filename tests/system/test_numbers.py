"""What is not finite, out of range, empty or constant is refused, stops a run, or leaves finite numbers."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_folders import write_folder

from resnet_jax import steps
from resnet_jax.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig, check_config
from resnet_jax.data import Dataset, Split, load_dataset, load_test_images
from resnet_jax.data.inputs import describe_inputs, load_data
from resnet_jax.data.sources.image_folder import load_image_folder
from resnet_jax.data.sources.tfds import TfdsImages
from resnet_jax.data.splits import make_split
from resnet_jax.data.types import Batch, Inputs, Preprocessing
from resnet_jax.errors import BrokenDataError, DivergedError, UserError
from resnet_jax.evaluate import evaluate
from resnet_jax.experiment import Experiment
from resnet_jax.feeds import ResidentFeed
from resnet_jax.models import BatchNorm, ResNet, cifar_resnet
from resnet_jax.models.stacking import init_variables
from resnet_jax.optim import sgd
from resnet_jax.run.checkpoint import restore, saved_steps
from resnet_jax.run.records import read_records
from resnet_jax.run.workdir import load_inputs
from resnet_jax.steps import create_train_state, cross_entropy, finite_parts, make_train_step
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
    dtype: Any
    conv_general_dilated: Any = None

    @nn.compact
    def __call__(self, images, *, train):
        x = BatchNorm(group_size=self.bn_group_size, dtype=self.dtype)(images, train=train)
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1)).astype(jnp.float32)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Stand in for every data set in memory and every network."""

    def load(name, data_dir):
        return load_image_folder(name, data_dir) if name == "folder" else DATASET

    def build(config, num_classes):
        return Tiny(num_classes, config.bn_group_size, jnp.dtype(config.dtype))

    monkeypatch.setattr("resnet_jax.experiment.load_dataset", load)
    for module in ("experiment", "trained"):
        monkeypatch.setattr(f"resnet_jax.{module}.build_model", build)


def make_config(workdir, *, model=None, data=None, optim=None, **run) -> Config:
    return Config(
        model=ModelConfig(**{"depth": 8, "bn_group_size": 4, **(model or {})}),
        data=DataConfig(**{"batch_size": 8, "eval_batch_size": 12, "padding": 1, **(data or {})}),
        optim=OptimConfig(**{"learning_rate": 0.05, "boundaries": (), **(optim or {})}),
        run=RunConfig(
            **{"workdir": str(workdir), "steps": 8, "log_every": 8, "eval_every": 8, "save_every": 2, "keep": 9, **run}
        ),
    )


def saved_states(workdir, config):
    """The states of all checkpoints by step."""
    abstract = Experiment(config, load_inputs(workdir)).abstract_state()
    return {step: restore(workdir, abstract, step) for step in saved_steps(workdir)}


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(np.asarray(leaf)).all()


def make_explosive(value):
    """A function that is zero everywhere, with the derivative `value`."""

    @jax.custom_vjp
    def explosive(x):
        return jnp.zeros_like(x)

    explosive.defvjp(lambda x: (explosive(x), None), lambda _, g: (jnp.where(g == 0, 0.0, value),))
    return explosive


POISONS = (
    *[(what, value) for what in ("loss", "gradient") for value in (NAN, INF)],
    *[(what, INF) for what in ("params", "batch_stats", "opt_state")],
)


def poison(monkeypatch, number=None, *, at=4):
    """Make the images, the gradient alone, or what the update leaves in a part of the state not finite in step `at`.

    Without `number` the labels say which of POISONS it is, so that one compiled program serves all.
    """
    make, loss, here = steps.make_train_step, steps.cross_entropy, {}

    def broken(what, array):
        for poison, value in POISONS:
            if poison == what:
                array = jnp.where(here[what, value], value, array)
        return array

    def make_poisoned(*args, **options):
        train_step = make(*args, **options)

        def poisoned(state, batch):
            chosen = batch.labels[0] if number is None else number
            here.update({poison: (state.step == at - 1) & (chosen == i) for i, poison in enumerate(POISONS)})
            after, report = train_step(state, batch._replace(images=broken("loss", batch.images)))
            parts = {
                what: jax.tree.map(lambda leaf, what=what: broken(what, leaf) if leaf.ndim else leaf, vars(after)[what])
                for what in ("params", "batch_stats", "opt_state")
            }
            return dataclasses.replace(after, **parts), report

        return poisoned

    def poisoned_loss(logits, labels, smoothing):
        losses = loss(logits, labels, smoothing)
        for value in (NAN, INF):
            losses += jnp.where(here["gradient", value], make_explosive(value)(logits[:, 0]), 0.0)
        return losses

    monkeypatch.setattr("resnet_jax.experiment.make_train_step", make_poisoned)
    monkeypatch.setattr("resnet_jax.steps.cross_entropy", poisoned_loss)


def labelled(label: int) -> Dataset:
    """The data set with one label for all images, and as many classes as there are poisons."""
    train, test = (Split(split.images, np.full(len(split), label, np.int32)) for split in (DATASET.train, DATASET.test))
    return Dataset("labelled", train, test, tuple(map(str, range(len(POISONS)))))


SINGLE, PARTS = {"steps_per_dispatch": 1}, {"accumulation_steps": 2}


# Every one with a checkpoint due at the step itself, 4.
@pytest.mark.parametrize(
    ("what", "value", "run", "optim", "message"),
    [
        ("loss", NAN, {}, {}, "the loss is nan at step 4"),
        ("loss", INF, {}, {}, "the loss is nan at step 4"),
        ("gradient", NAN, {}, {}, "the gradient is nan at step 4"),
        ("gradient", NAN, SINGLE, {}, "the gradient is nan at step 4"),
        ("gradient", INF, {}, PARTS, "the gradient is (inf|nan) at step 4"),
        ("params", INF, {}, {}, "the parameters overflowed in step 4"),
        ("params", INF, SINGLE, {}, "the parameters overflowed in step 4"),
        ("batch_stats", INF, {}, PARTS, "the running statistics of BN overflowed in step 4"),
        ("opt_state", INF, {}, {}, "the state of the optimizer overflowed in step 4"),
    ],
)
def test_what_is_not_finite_stops_the_run_and_is_not_saved(tmp_path, monkeypatch, what, value, run, optim, message):
    dataset = labelled(POISONS.index((what, value)))
    monkeypatch.setattr("resnet_jax.experiment.load_dataset", lambda name, data_dir: dataset)
    config = make_config(tmp_path / "run", data={"mean": (0.5, 0.5, 0.5)}, optim=optim, **run)
    with monkeypatch.context() as patch:
        poison(patch)
        with pytest.raises(DivergedError, match=f"^{message}; the last good checkpoint is step 2 in .*checkpoints;"):
            train(config)
    states = saved_states(tmp_path / "run", config)
    assert list(states) == [2]
    assert_finite(states)
    for record in read_records(tmp_path / "run"):
        assert_finite([value for value in record.values() if isinstance(value, float)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_folder(folder, classes=3, images=4, test_images=2, side=12)
    return folder


STREAMED = {"name": "folder", "image_size": 8, "shorter_side": (8, 12), "workers": 0, "mean": (0.5, 0.5, 0.5)}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (("gradient", NAN), "the gradient is nan at step 4"),
        (("batch_stats", INF), "the running statistics of BN overflowed in step 4"),
    ],
)
def test_the_same_with_streamed_images(tmp_path, monkeypatch, folder, what, message):
    config = make_config(tmp_path / "run", data={**STREAMED, "dir": str(folder)})
    with monkeypatch.context() as patch:
        poison(patch, POISONS.index(what))
        with pytest.raises(DivergedError, match=f"^{message}; the last good checkpoint is step 2 in "):
            train(config)
    states = saved_states(tmp_path / "run", config)
    assert list(states) == [2]
    assert_finite(states)


def test_an_overflow_between_two_checkpoints_is_found_by_the_next_step(tmp_path, monkeypatch):
    poison(monkeypatch, POISONS.index(("params", INF)), at=3)
    with pytest.raises(DivergedError, match="the loss is nan at step 4; the last good checkpoint is step 2 "):
        train(make_config(tmp_path / "run"))


def test_a_checkpoint_whose_next_step_is_not_finite_is_not_called_good(tmp_path, monkeypatch):
    poison(monkeypatch, POISONS.index(("loss", NAN)))
    with pytest.raises(DivergedError, match="at step 4; the last good checkpoint is step 2 "):
        train(make_config(tmp_path / "run", save_every=1))
    assert saved_steps(tmp_path / "run") == [1, 2, 3]
    with pytest.raises(DivergedError, match="at step 4; there is no good checkpoint yet in "):
        train(make_config(tmp_path / "other", save_every=3))
    with pytest.raises(DivergedError, match="at step 4; the last good checkpoint is step 2 "):
        train(make_config(tmp_path / "run", save_every=1))  # begins with the checkpoint of step 3


def test_updates_that_overflow_by_themselves(tmp_path):
    # Two good steps, then updates of 3e38 times more than 10.
    optim = {"warmup": "steps", "warmup_steps": 2, "warmup_learning_rate": 1e-4, "learning_rate": 3e38}
    optim |= {"weight_decay": 100.0}
    with pytest.raises(DivergedError, match="^the parameters overflowed in step 3; the last good checkpoint is step 2"):
        train(make_config(tmp_path / "run", optim=optim, save_every=1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_images_too_large_for_their_variance(tmp_path, dtype):
    # Activations of about 1e25 are finite and so is the loss, but not their squares.
    config = make_config(tmp_path / "run", model={"dtype": dtype}, data={"std": (1e-25,) * 3}, save_every=1)
    with pytest.raises(DivergedError, match="; there is no good checkpoint yet in"):
        train(config)
    assert saved_steps(tmp_path / "run") == []


def test_the_infinite_scalar_of_a_schedule_is_no_overflow():
    state = create_train_state(sgd(lambda step: 0.1), {"params": {"kernel": jnp.ones(2)}})
    state = state.replace(opt_state=(state.opt_state, jnp.float32(INF)))  # reduce_on_plateau's best error so far
    assert all(finite_parts(state).values())
    assert not finite_parts(state.replace(opt_state=jnp.array([INF])))["state of the optimizer"]
    assert not finite_parts(state.replace(params={"kernel": jnp.array([1.0, NAN])}))["parameters"]


def test_an_evaluation_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path, monkeypatch):
    make = steps.make_eval_step

    def make_poisoned(model):
        evaluate = make(model)
        return lambda state, batch: jax.tree.map(lambda sums: sums + jnp.array(NAN), evaluate(state, batch)).replace(
            count=evaluate(state, batch).count
        )

    monkeypatch.setattr("resnet_jax.experiment.make_eval_step", make_poisoned)
    with pytest.raises(DivergedError, match="the test loss is nan after step 4; the last good checkpoint is step 2 "):
        train(make_config(tmp_path / "run", eval_every=4))
    assert saved_steps(tmp_path / "run") == [2]
    assert [record["kind"] for record in read_records(tmp_path / "run")] == ["start", "train", "train"]


def test_test_images_none_of_which_can_be_read(tmp_path, folder):
    write_folder(tmp_path / "images", classes=3, images=4, test_images=1, side=12)
    for path in (tmp_path / "images" / "val").rglob("*.jpg"):
        path.write_bytes(b"")
    config = make_config(tmp_path / "run", data={**STREAMED, "dir": str(tmp_path / "images")}, steps=1)
    with pytest.raises(BrokenDataError, match="none of the test images can be read: .* data check .*/images"):
        train(config)


def test_a_network_that_gives_nan_is_not_given_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("resnet_jax.data.load_dataset", lambda name, data_dir: DATASET)
    train(make_config(tmp_path / "run", steps=1))
    monkeypatch.setattr("resnet_jax.evaluate.predict", lambda *args, **options: np.full((11, 3), NAN))
    with pytest.raises(DivergedError, match="run: the outputs of the network of step 1 are not finite"):
        evaluate([tmp_path / "run"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3, 1], "FILE: label 3 of image 1 is outside 0..2"),
        ([0, -1, 1], "FILE: label -1 of image 1 is outside 0..2"),
        ([0, NAN, 1], "FILE: expected labels .* whole numbers, found float64"),
        ([[0], [1], [2]], r"FILE: expected labels \[N\] .* found int64 \(3, 1\)"),
    ],
)
def test_labels_that_are_no_class_are_refused(labels, message):
    with pytest.raises(UserError, match=message):
        make_split(np.zeros((3, 8, 8, 3), np.uint8), np.array(labels), 3, "FILE")


def test_labels_of_tfds_records_that_are_no_class_are_refused():
    images = TfdsImages(pathlib.Path("/set"), "train", 3)
    vars(images)["_source"] = [{"image": b"", "label": label} for label in (0, 1, -1)]
    with pytest.raises(UserError, match=r"/set: cannot read the image train/2 \(its label -1 is outside 0..2\)"):
        _ = images.labels
    with pytest.raises(Exception, match="its label -1 is outside 0..2"):
        images.read(2)


@pytest.mark.parametrize(
    ("train_images", "test_images", "classes", "message"),
    [
        (0, 11, 3, "digits in DIR has no training images"),
        (29, 0, 3, "digits in DIR has no test images"),
        (29, 11, 0, "digits in DIR has no classes"),
    ],
)
def test_nothing_to_train_on_or_to_test_on_is_refused(monkeypatch, train_images, test_images, classes, message):
    splits = random_split(train_images, seed=0), random_split(test_images, seed=0)
    monkeypatch.setattr("resnet_jax.data.load_digits", lambda: Dataset("x", *splits, ("a", "b", "c")[:classes]))
    for load in (load_dataset, load_test_images):
        with pytest.raises(UserError, match=message):
            load("digits", "DIR")


def test_a_batch_larger_than_the_training_set_is_refused_and_one_as_large_is_not(tmp_path):
    with pytest.raises(UserError, match="a batch of 30 is larger than the 29 training images of random"):
        load_data(make_config(tmp_path, data={"batch_size": 30}))
    assert len(load_data(make_config(tmp_path, data={"batch_size": 29})).train) == 29


def test_an_evaluation_batch_larger_than_the_set_counts_each_image_once(tmp_path):
    config = make_config(tmp_path, data={"eval_batch_size": 64})
    experiment = Experiment(config, describe_inputs(config, DATASET))
    metrics = ResidentFeed(experiment, DATASET).evaluate(experiment.initial_state(), "test")
    np.testing.assert_array_equal(metrics.count, np.bincount(DATASET.test.labels, minlength=3))
    config = make_config(tmp_path)
    experiment = Experiment(config, describe_inputs(config, DATASET))
    others = ResidentFeed(experiment, DATASET).evaluate(experiment.initial_state(), "test")
    assert metrics.mean_loss == pytest.approx(others.mean_loss, rel=1e-5)


def test_more_steps_than_a_position_can_count_are_refused(tmp_path):
    with pytest.raises(UserError, match="--run.steps 268435456 of 8 images are 2,147,483,648, beyond"):
        load_data(make_config(tmp_path, steps=2**28))
    assert load_data(make_config(tmp_path, steps=2**28 - 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [0, 255])
def test_images_that_are_all_the_same_are_trained_on(dtype, value):
    model = ResNet("cifar", "basic", (1, 1), (4, 8), 3, "A", bn_group_size=4, dtype=jnp.dtype(dtype))
    images = jnp.full((8, 8, 8, 3), value / 255)
    batch = Batch(images, jnp.arange(8) % 3, jnp.ones(8, bool))
    optimizer = sgd(lambda step: 0.1)
    state = create_train_state(optimizer, init_variables(model, jax.random.key(0), (8, 8, 3)))
    step = jax.jit(make_train_step(model, optimizer, lambda step: 0.1, jax.random.key(1)))
    for _ in range(20):
        state, report = step(state, batch)
        assert_finite(report)
    assert_finite(state)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.batch_stats):
        assert path[-1].key == "mean" or (np.asarray(leaf) >= 0).all()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    assert_finite(jax.jit(lambda variables: model.apply(variables, images, train=False))(variables))


def test_bn_of_a_single_value_is_refused(tmp_path, monkeypatch):
    monkeypatch.undo()  # the real networks
    x = jnp.ones((4, 1, 1, 3))
    layer = BatchNorm(group_size=1)
    variables = layer.init(jax.random.key(0), x, train=False)
    with pytest.raises(
        ValueError, match=r"BN of a single value: groups of 1 image of \(1, 1\) pixels have no variance"
    ):
        layer.apply(variables, x, train=True, mutable=["batch_stats"])
    layer.apply(variables, x, train=False)
    pair, stats = BatchNorm(group_size=2).apply(variables, x.at[1].set(3), train=True, mutable=["batch_stats"])
    assert_finite((pair, stats))
    single = {"model": {"bn_group_size": 1}}
    pixel = Inputs((1, 1, 3), ("a", "b"), Preprocessing(np.zeros(3, np.float32), np.ones(3, np.float32)))
    with pytest.raises(UserError, match="images of 1x1 pixels are a single pixel, and BN needs more than one value"):
        Experiment(make_config(tmp_path, **single), pixel)
    Experiment(make_config(tmp_path, **single), pixel._replace(image_shape=(1, 5, 3)))


@pytest.mark.parametrize(
    ("dtype", "mean", "std"), [("float32", 1e4, 1.0), ("bfloat16", 256.0, 4.0), ("bfloat16", 1e4, 100)]
)
def test_statistics_agree_with_float64_where_the_mean_is_large(dtype, mean, std):
    x = jnp.asarray(np.random.RandomState(0).normal(mean, std, (8, 16, 16, 4)), jnp.dtype(dtype))
    layer = BatchNorm(group_size=8, decay=0.0, running_variance="biased", dtype=jnp.dtype(dtype))
    variables = layer.init(jax.random.key(0), x, train=False)
    _, updates = jax.jit(lambda x: layer.apply(variables, x, train=True, mutable=["batch_stats"]))(x)
    exact = np.asarray(x, np.float64)
    # E[x^2] - E[x]^2 in float32 is off by some 8 (1e8 * 2^-24 and more) where the variance is 1.
    np.testing.assert_allclose(updates["batch_stats"]["var"], exact.var((0, 1, 2)), rtol=1e-3)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], exact.mean((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_large_logits_is_finite_and_right(smoothing):
    logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]])
    labels = jnp.array([1, 0])
    losses, gradient = (
        cross_entropy(logits, labels, smoothing),
        jax.grad(lambda x: cross_entropy(x, labels, smoothing).sum()),
    )
    expected = [
        (1 - smoothing) * 2e4 + smoothing * 1e4,
        (1 - smoothing / 3) * 0 + (1 - smoothing) * 2e4 + smoothing / 3 * 2e4,
    ]
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    assert_finite(gradient(logits))


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
    ("group", "fields", "message"),
    [
        ("data", {"std": (1.0, 0.0, 1.0)}, "--data.std must be above 0 and finite"),
        ("data", {"std": (NAN, 1.0, 1.0)}, "--data.std must be above 0 and finite"),
        ("data", {"std": (INF, 1.0, 1.0)}, "--data.std must be above 0 and finite"),
        ("data", {"mean": (0.5, NAN, 0.5)}, "--data.mean must be finite"),
        ("data", {"lighting": INF}, "--data.lighting must be at least 0 and finite"),
        ("optim", {"weight_decay": INF}, "--optim.weight-decay must be at least 0 and finite"),
        ("optim", {"weight_decay": NAN}, "--optim.weight-decay must be at least 0 and finite"),
        ("optim", {"learning_rate": NAN}, "--optim.learning-rate must be above 0 and finite"),
        ("optim", {"warmup_error": NAN}, "--optim.warmup-error must be above 0 and finite"),
    ],
)
def test_options_that_are_no_numbers_are_refused(group, fields, message):
    config = dataclasses.replace(Config(), **{group: dataclasses.replace(getattr(Config(), group), **fields)})
    with pytest.raises(UserError, match=message):
        check_config(config)


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
    config = make_config(tmp_path / "run", steps=1)
    with pytest.raises(UserError, match=message):
        describe_inputs(config, DATASET, Preprocessing(np.array(mean), np.array(std)))
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "inputs.json").write_text('{"image_shape": [8, 8, 3], "class_names": ["a"]}')
    np.savez(folder / "preprocessing.npz", mean=np.float32(mean), std=np.float32(std))
    with pytest.raises(UserError, match=f"cannot read .* in .*made: {message}"):
        load_inputs(folder)


def test_a_data_set_of_one_colour_is_trained_on(tmp_path, monkeypatch):
    split = Split(np.full((29, 8, 8, 3), 77, np.uint8), DATASET.train.labels)
    dataset = Dataset("grey", split, split, DATASET.class_names)
    monkeypatch.setattr("resnet_jax.experiment.load_dataset", lambda name, data_dir: dataset)
    metrics = train(make_config(tmp_path / "run", steps=4))  # its mean image is subtracted: all zeros are left
    assert np.isfinite(metrics.mean_loss)
    assert_finite(saved_states(tmp_path / "run", make_config(tmp_path / "run")))
