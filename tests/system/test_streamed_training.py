"""Training runs on images that are read while they train: resuming, broken files, validation, plateaus."""

import dataclasses
import json
import pathlib
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_folders import write_folder

from resnet_jax.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from resnet_jax.data import load_dataset
from resnet_jax.data.streamed import StreamedData
from resnet_jax.data.tools.statistics import compute_statistics, load_statistics, save_statistics
from resnet_jax.data.types import HostBatch, Inputs, Preprocessing, StreamedDataset
from resnet_jax.errors import BrokenDataError, UserError
from resnet_jax.evaluate import evaluate
from resnet_jax.metrics import StepMetrics
from resnet_jax.run.checkpoint import restore
from resnet_jax.run.workdir import load_inputs
from resnet_jax.steps import make_streamed_step
from resnet_jax.trainer import Trainer
from resnet_jax.training import train


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 48 training and 12 test images, with statistics."""
    folder = tmp_path_factory.mktemp("images")
    write_folder(folder, classes=3, images=16, test_images=4)
    save_statistics(compute_statistics(load_dataset("folder", folder).train, 32, workers=0), folder)
    return folder


def make_config(images, workdir, *, model=None, data=None, optim=None, **run):
    return Config(
        model=ModelConfig(**{"depth": 8, "bn_group_size": 8, **(model or {})}),
        data=DataConfig(
            **{
                "name": "folder",
                "dir": str(images),
                "batch_size": 16,
                "eval_batch_size": 8,
                "image_size": 32,
                "shorter_side": (32, 48),
                "lighting": 0.1,
                "workers": 0,
                **(data or {}),
            }
        ),
        optim=OptimConfig(**{"learning_rate": 0.05, "boundaries": (), **(optim or {})}),
        run=RunConfig(
            **{"workdir": str(workdir), "steps": 12, "log_every": 4, "eval_every": 6, "save_every": 4, **run}
        ),
    )


def records(workdir, kind):
    every = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in every if record["kind"] == kind]


def last_state(workdir, config):
    trainer = Trainer(config, load_inputs(workdir), load_dataset("folder", config.data.dir))
    return jax.device_get(restore(workdir, trainer.abstract_state()))


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """An undisturbed run of 12 steps and its final metrics."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    return workdir, train(make_config(images, workdir))


def test_a_run_learns_and_records_what_it_did(images, finished):
    workdir, metrics = finished
    assert metrics.images == 12
    assert metrics.top1_error < 40  # 67 % by chance
    assert [(r["step"], r["images"], r["skipped"]) for r in records(workdir, "train")] == [
        (4, 64, 0),
        (6, 32, 0),
        (8, 32, 0),
        (12, 64, 0),
    ]
    assert [r["step"] for r in records(workdir, "test")] == [6, 12]
    inputs = load_inputs(workdir)
    assert inputs.class_names == ("class0", "class1", "class2")
    assert inputs.image_shape == inputs.preprocessing.mean.shape == (32, 32, 3)
    statistics = load_statistics(load_dataset("folder", images), images)
    np.testing.assert_allclose(inputs.lighting, 0.1 * statistics.lighting)
    np.testing.assert_array_equal(inputs.preprocessing.mean, statistics.mean)


def test_eval_py_finds_the_same(finished):
    workdir, metrics = finished
    evaluation = evaluate([workdir])
    assert evaluation.count == 12
    assert evaluation.loss == pytest.approx(metrics.mean_loss, rel=1e-4)
    assert evaluation.top1_error == pytest.approx(metrics.top1_error)


def test_a_resumed_run_ends_with_the_same_bits(images, finished, tmp_path):
    workdir, _ = finished
    config = make_config(images, tmp_path / "run")
    train(dataclasses.replace(config, run=dataclasses.replace(config.run, steps=8)))
    train(config)
    jax.tree.map(np.testing.assert_array_equal, last_state(tmp_path / "run", config), last_state(workdir, config))


def test_worker_processes_change_nothing(images, finished, tmp_path):
    workdir, _ = finished
    config = make_config(images, tmp_path / "run", data={"workers": 1})
    train(config)
    jax.tree.map(np.testing.assert_array_equal, last_state(tmp_path / "run", config), last_state(workdir, config))


def test_colours_are_shifted_and_the_mean_is_subtracted():
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (64, 4, 4, 3)).astype(np.uint8)
    mean, std = random.rand(4, 4, 3).astype(np.float32), np.array([0.5, 1, 2], np.float32)
    lighting = np.array([[0.1, 0, 0], [0.1, 0, 0], [0, 0, 0.2]], np.float32)  # red and green together; blue
    seen = {}

    def train_step(state, batch):
        seen[int(state.step)] = np.asarray(batch.images)
        zero = np.float32(0)
        return state, StepMetrics(metrics=zero, learning_rate=zero, gradient_norm=zero, skipped=zero)

    for lights in (None, lighting):
        inputs = Inputs((4, 4, 3), ("a",), Preprocessing(mean, std), lights)
        empty = StreamedDataset("none", pathlib.Path(), (), (), ("a",))
        data = StreamedData(empty, DataConfig(), inputs, jax.random.key(0), seed=0, by_image=None)
        streamed_step = make_streamed_step(train_step, data.to_train_batch)
        broken = np.where(np.arange(64) < 3, 7, -1)
        batch = HostBatch(jnp.array(images), np.zeros(64, np.int32), broken, np.ones(64, bool))
        for step in (0, 1):
            _, report = streamed_step(SimpleNamespace(step=step), batch)
            assert (report.steps, report.history.skipped.tolist()) == (1, [3.0])
        if lights is None:
            plain = (images / 255 - mean) / std
            np.testing.assert_allclose(seen[0], plain, atol=1e-5)
            np.testing.assert_allclose(seen[1], plain, atol=1e-5)
    shifts = (seen[0] - plain) * std
    np.testing.assert_allclose(shifts, np.broadcast_to(shifts[:, :1, :1], shifts.shape), atol=1e-5)  # one an image
    red, green, blue = shifts[:, 0, 0].T
    np.testing.assert_allclose(red, green, atol=1e-5)
    assert red.std() == pytest.approx(0.1, rel=0.3)
    assert blue.std() == pytest.approx(0.2, rel=0.3)
    assert abs(np.corrcoef(red, blue)[0, 1]) < 0.4
    assert (seen[0] != seen[1]).any()  # each step has its own


@pytest.fixture
def damaged(images, tmp_path):
    """The same folder with one broken training image and one broken test image."""
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "train" / "class1" / "3.jpg").write_bytes(b"")
    path = folder / "val" / "class1" / "3.jpg"
    path.write_bytes(path.read_bytes()[:100])
    return folder


def test_broken_images_are_skipped_counted_and_named(damaged, tmp_path, capsys):
    metrics = train(make_config(damaged, tmp_path / "run", data={"max_broken": 3.0}))
    assert metrics.images == 11
    printed = capsys.readouterr().out
    assert printed.count("cannot read the training image class1/3.jpg: left out") == 1
    assert printed.count("cannot read the test image class1/3.jpg: left out") == 1
    # 12 batches of 16 are 4 epochs of 48 images; the image that takes its place counts.
    assert sum(record["skipped"] for record in records(tmp_path / "run", "train")) == 4
    assert sum(record["images"] for record in records(tmp_path / "run", "train")) == 12 * 16


def test_too_many_broken_images_stop_the_run(damaged, tmp_path):
    with pytest.raises(BrokenDataError, match=r"1 of 48 training images .* --data.max-broken 2 %: .* data check"):
        train(make_config(damaged, tmp_path / "run", data={"max_broken": 2.0}))


def test_the_rate_falls_when_the_validation_error_does_not(images, tmp_path):
    workdir = tmp_path / "run"
    config = make_config(
        images,
        workdir,
        model={"frozen_bn": True},
        data={"validation_size": 8},
        optim={"schedule": "plateau", "plateau_patience": 2, "learning_rate": 1e-7},  # nothing is learnt
        eval_every=2,
        save_every=12,
    )
    train(config)
    assert [record["images"] for record in records(workdir, "validation")] == [8] * 6
    rates = [record["learning_rate"] for record in records(workdir, "train")]
    errors = [record["error"] for record in records(workdir, "validation")]
    assert len(set(errors)) == 1
    # The first evaluation, after 2 steps, sets the mark; those after 4 and 6, and after 8 and 10, do not fall below it.
    assert rates == pytest.approx([1e-7] * 3 + [1e-8] * 2 + [1e-9], rel=1e-3)


def test_mistakes(images, tmp_path, monkeypatch):
    def mistake(**data):
        with pytest.raises(UserError) as error:
            train(make_config(images, tmp_path / "run", data=data))
        assert not (tmp_path / "run").exists()
        return str(error.value)

    (tmp_path / "empty").mkdir()
    assert "empty" in mistake(dir=str(tmp_path / "empty"))
    assert "a batch of 56 is larger than the 48 training images" in mistake(batch_size=56)
    assert "choose between 1 and 47" in mistake(validation_size=48)
    shutil.copytree(images, tmp_path / "copy")
    (tmp_path / "copy" / "statistics.npz").unlink()
    monkeypatch.setattr("resnet_jax.data.tools.statistics._SMALL", 47)  # of which a run computes them itself
    assert "data statistics" in mistake(dir=str(tmp_path / "copy"))
    assert "--data.image-size is for streamed images" in mistake(name="digits")
