"""100 real ImageNet photographs: the folder and its packed form show the same images, and ResNet-18 learns them."""

import json
import shutil

import numpy as np
import pytest
from paths import SHARED

from resnet_jax.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from resnet_jax.data import load_dataset
from resnet_jax.data.augment import scale_window
from resnet_jax.data.streamed import training_batches
from resnet_jax.data.tools.pack import PackOptions, pack
from resnet_jax.training import train

SAMPLE = SHARED / "data" / "imagenet_sample" / "train"
GREY = 71  # the label of the one photograph without colours


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The photographs as train/ and val/."""
    if not SAMPLE.is_dir():
        pytest.skip("the ImageNet photographs (../shared/data/imagenet_sample) are not here")
    folder = tmp_path_factory.mktemp("sample")
    for split in ("train", "val"):
        shutil.copytree(SAMPLE, folder / split)
    return folder


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "sample"
    pack(folder, out, PackOptions(short_side=300))  # so that most of them are resized
    return out


def test_a_packed_set_that_resizes_nothing_shows_the_same_pixels(folder, tmp_path):
    pack(folder, tmp_path / "packed", PackOptions(short_side=864))
    for ours, theirs in zip(first_batches(folder), first_batches(tmp_path / "packed"), strict=True):
        in_colour = ours.labels != GREY  # which is written anew, as RGB
        assert in_colour.sum() >= 39
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        np.testing.assert_array_equal(ours.images[in_colour], theirs.images[in_colour])


def first_batches(data_dir, steps=3):
    window = scale_window(224, (256, 300))
    images = load_dataset("folder", data_dir).train
    with training_batches(images, window, size=224, flip=True, batch_size=40, seed=5, step=1, workers=0) as batches:
        return [next(batches) for _ in range(steps)]


def test_the_packed_set_shows_the_same_parts_of_the_same_images(folder, packed):
    for ours, theirs in zip(first_batches(folder), first_batches(packed), strict=True):
        np.testing.assert_array_equal(ours.labels, theirs.labels)  # one image a class
        difference = np.abs(ours.images.astype(int) - theirs.images).mean((1, 2, 3))
        contrast = ours.images.std((1, 2, 3))
        assert np.median(difference / contrast) < 0.05
        # Another part of the image, or its mirror image, would be about as far away as its contrast.
        assert (difference < 0.25 * contrast).all()


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Every tenth photograph."""
    if not SAMPLE.is_dir():
        pytest.skip("the ImageNet photographs (../shared/data/imagenet_sample) are not here")
    folder, out = (tmp_path_factory.mktemp("few") / name for name in ("folder", "packed"))
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        for path in sorted(SAMPLE.iterdir())[::10]:
            shutil.copytree(path, folder / split / path.name)
    pack(folder, out, PackOptions(short_side=300))
    return out


@pytest.mark.parametrize(
    ("form", "count", "steps"),
    [
        pytest.param("few", 10, 20, marks=pytest.mark.slow),
        pytest.param("folder", 100, 60, marks=pytest.mark.slow),
        pytest.param("packed", 100, 60, marks=pytest.mark.slow),
    ],
)
def test_resnet18_learns_them_by_heart(form, count, steps, request, tmp_path):
    config = Config(
        model=ModelConfig(family="imagenet", depth=18, shortcut="A", bn_group_size=None),
        data=DataConfig(
            name="folder",
            dir=str(request.getfixturevalue(form)),
            batch_size=min(count, 20),
            eval_batch_size=20,
            shorter_side=(224, 224),
            flip=False,
            mean=(0.48, 0.45, 0.41),
            workers=0,
        ),
        optim=OptimConfig(learning_rate=0.006, boundaries=(), weight_decay=0.0),
        run=RunConfig(workdir=str(tmp_path / "run"), steps=steps, log_every=5, eval_every=steps, save_every=steps),
    )
    metrics = train(config)
    assert metrics.images == count
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    errors = [record["error"] for record in records if record["kind"] == "train"]
    print("training error in %, of five steps each:", errors)
    assert errors[0] > 20
    assert np.mean(errors[-2:]) < 5
