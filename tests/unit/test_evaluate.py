"""Evaluation of work directories: protocols, ensembles, exact counts, files; on made-up images."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from slow_dense import random_variables

from resnet_jax.config import Config, DataConfig, ModelConfig
from resnet_jax.data import Dataset, LabelledImages, Split
from resnet_jax.data.types import Inputs, Preprocessing
from resnet_jax.data.views import make_protocol
from resnet_jax.errors import BrokenDataError, UserError
from resnet_jax.evaluate import Evaluation, Member, evaluate, record
from resnet_jax.models import build_model
from resnet_jax.optim import build_optimizer, build_schedule
from resnet_jax.run.records import read_evaluations
from resnet_jax.run.workdir import create_workdir
from resnet_jax.steps import create_train_state

RANDOM = np.random.RandomState(0)
TEST = Split(RANDOM.randint(0, 256, (23, 12, 12, 3)).astype(np.uint8), RANDOM.randint(0, 5, 23).astype(np.int32))
CLASSES = tuple("abcde")


@pytest.fixture(autouse=True, scope="module")
def tiny_dataset():
    """Stand in for CIFAR-10."""
    with pytest.MonkeyPatch.context() as patch:
        dataset = Dataset("tiny", TEST, TEST, CLASSES)
        patch.setattr("resnet_jax.data.sources.load_dataset", lambda name, data_dir, **options: dataset)
        yield


def make_workdir(path, depth, input_size, mean, data="cifar10", classes=CLASSES):
    config = Config(model=ModelConfig(depth=depth), data=DataConfig(name=data, eval_batch_size=6))
    model = build_model(config.model, len(classes))
    optimizer = build_optimizer(config.optim, build_schedule(config.optim, config.run.steps))
    state = create_train_state(optimizer, random_variables(model, input_size))
    inputs = Inputs((*input_size, 3), classes, Preprocessing(mean, np.ones(3, np.float32)))
    create_workdir(path, config, inputs, jax.tree.map(jax.numpy.asarray, state))
    return path


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Two networks of different depth, input size and preprocessing."""
    root = tmp_path_factory.mktemp("runs")
    mean_image = RANDOM.uniform(0.3, 0.7, (12, 12, 3)).astype(np.float32)
    return [
        make_workdir(root / "eight", 8, (12, 12), mean_image),
        make_workdir(root / "fourteen", 14, (8, 8), np.array([0.2, 0.5, 0.6], np.float32)),
    ]


@pytest.fixture(scope="module")
def single(workdirs):
    return [evaluate([workdir]) for workdir in workdirs]


def test_every_image_counts_once(single):
    for evaluation in single:
        assert evaluation.count == 23  # 6 at a time
        assert evaluation.probabilities.shape == (23, 5)
        np.testing.assert_allclose(evaluation.probabilities.sum(1), 1)
    assert np.abs(single[0].probabilities - single[1].probabilities).max() > 0.1


def test_an_ensemble_averages_probabilities(workdirs, single):
    of_one = evaluate([workdirs[0], workdirs[0]])
    np.testing.assert_allclose(of_one.probabilities, single[0].probabilities, rtol=1e-12)
    assert of_one.top1_error == single[0].top1_error
    both = evaluate(workdirs)
    np.testing.assert_allclose(both.probabilities, (single[0].probabilities + single[1].probabilities) / 2, rtol=1e-9)
    assert [(m.workdir, m.step, m.protocol.input_size) for m in both.members] == [
        (workdirs[0], 0, (12, 12)),
        (workdirs[1], 0, (8, 8)),
    ]


def test_scales_of_each_member(workdirs):
    both = evaluate(workdirs, protocol="10crop", batch_size=60)
    assert [member.protocol.scales for member in both.members] == [(14,), (9,)]
    assert both.count == 23
    with pytest.raises(UserError, match="--scales: a scale of 9 is smaller than the network's input of 12 pixels"):
        evaluate(workdirs, protocol="multiscale", scales=(12, 9))


def made(probabilities, labels):
    images = LabelledImages("made", np.zeros((len(labels), 1, 1, 3), np.uint8), np.array(labels), (), tuple("abcdefgh"))
    return Evaluation((Member(None, 7, make_protocol("single", (8, 8))),), images, np.array(probabilities))


def test_errors_by_hand():
    falling = [0.3, 0.2, 0.15, 0.1, 0.09, 0.08, 0.05, 0.03]
    evaluation = made([falling] * 4, [0, 4, 5, 5])
    assert evaluation.top1_error == 75
    assert evaluation.top5_error == 50
    assert evaluation.loss == pytest.approx(-np.log([0.3, 0.09, 0.08, 0.08]).mean())
    np.testing.assert_array_equal(evaluation.class_errors, [0, np.nan, np.nan, np.nan, 100, 100, np.nan, np.nan])
    # Of equal probabilities the first classes count as the most probable ones, as for argmax.
    equal = made([[0.125] * 8] * 3, [0, 4, 5])
    assert equal.top1_error == pytest.approx(200 / 3)
    assert equal.top5_error == pytest.approx(100 / 3)


def test_predictions_and_records(workdirs, single, tmp_path):
    path = tmp_path / "predictions.npz"
    single[0].save_predictions(path)
    with np.load(path) as saved:
        assert sorted(saved) == ["class_names", "ids", "labels", "probabilities"]
        np.testing.assert_array_equal(saved["labels"], TEST.labels)
        np.testing.assert_allclose(saved["probabilities"], single[0].probabilities, rtol=1e-6)
        assert saved["ids"].tolist() == [str(i) for i in range(23)]
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.npz"]
    with pytest.raises(UserError, match="cannot write .*none/predictions.npz: No such file"):
        single[0].save_predictions(tmp_path / "none" / "predictions.npz")

    record(single[0])
    both = dataclasses.replace(single[0], members=single[0].members + single[1].members)
    record(both)
    with (workdirs[1] / "evaluations.jsonl").open("a") as file:
        file.write('{"protocol": "sin')  # cut short
    first, second = read_evaluations(workdirs[0])
    assert (first["protocol"], first["count"], first["data"]) == ("single", 23, "tiny")
    assert first["top1_error"] == single[0].top1_error
    assert [m["workdir"] for m in second["members"]] == [str(w) for w in workdirs]
    assert read_evaluations(workdirs[1]) == [second]
    assert json.dumps(single[0].to_dict())


def test_a_folder_of_images(tmp_path):
    mean = np.full(3, 0.5, np.float32)
    workdir = make_workdir(tmp_path / "run", 8, (8, 8), mean, data="imagenet", classes=("0", "1", "2"))
    with pytest.raises(UserError, match="no folder .*/data/val: --data.dir must name the folder"):
        evaluate([workdir], data_dir=str(tmp_path / "data"))
    for name in ("n02", "n01", "n03"):  # n03 stays empty
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
    with pytest.raises(UserError, match="no images in"):
        evaluate([workdir], data_dir=str(tmp_path / "data"))
    image = Image.fromarray(RANDOM.randint(0, 256, (17, 30, 3)).astype(np.uint8))
    image.save(tmp_path / "data" / "val" / "n01" / "colour.png")
    image.convert("L").save(tmp_path / "data" / "val" / "n02" / "grey.JPEG")
    image.convert("CMYK").resize((9, 20)).save(tmp_path / "data" / "val" / "n02" / "cmyk.JPEG")
    evaluation = evaluate([workdir], data_dir=str(tmp_path / "data"))
    assert evaluation.test.ids == ("n01/colour.png", "n02/cmyk.JPEG", "n02/grey.JPEG")
    assert evaluation.test.labels.tolist() == [0, 1, 1]
    assert np.isnan(evaluation.class_errors[2])
    assert evaluation.to_dict()["class_errors"]["n03"] is None
    broken = tmp_path / "data" / "val" / "n02" / "broken.JPEG"
    broken.write_bytes(b"\xff\xd8 no image")
    again = evaluate([workdir], data_dir=str(tmp_path / "data"))
    assert again.unreadable == ("n02/broken.JPEG: no image",)
    assert (again.test.ids, again.count) == (evaluation.test.ids, 3)
    np.testing.assert_array_equal(again.probabilities, evaluation.probabilities)
    np.testing.assert_array_equal(again.test.images[2], evaluation.test.images[2])
    with pytest.raises(BrokenDataError, match="cannot read 1 of 4 test images, more than --max-broken 20 %"):
        evaluate([workdir], data_dir=str(tmp_path / "data"), max_broken=20)
    broken.unlink()
    (tmp_path / "data" / "val" / "n04").mkdir()
    with pytest.raises(UserError, match="imagenet has 4 classes, but the weights are for 3; check --data.dir"):
        evaluate([workdir], data_dir=str(tmp_path / "data"))
