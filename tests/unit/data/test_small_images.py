"""Folders of small images of one size are kept on the devices as CIFAR-10 is; others are streamed, or refused."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from resnet_jax.config import Config, DataConfig
from resnet_jax.data.inputs import describe_inputs, load_data
from resnet_jax.data.types import Dataset, StreamedDataset
from resnet_jax.errors import UserError

CLASSES = ("ant", "bee")


@pytest.fixture
def folder(tmp_path):
    """PNG files of 24x20 pixels: (split, class, number) -> pixels."""
    random, pixels = np.random.default_rng(0), {}
    for split, count in (("train", 6), ("val", 2)):
        for name in CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                pixels[split, name, number] = random.integers(0, 256, (24, 20, 3)).astype(np.uint8)
                Image.fromarray(pixels[split, name, number]).save(tmp_path / split / name / f"{number}.png")
    return tmp_path, pixels


def config(folder, **options):
    data = DataConfig("folder", str(folder), batch_size=4, **options)
    return Config(data=data, run=dataclasses.replace(Config().run, steps=3))


def test_they_are_in_memory_pixel_by_pixel(folder):
    root, pixels = folder
    dataset = load_data(config(root))
    assert isinstance(dataset, Dataset)
    assert (dataset.class_names, dataset.image_shape, dataset.untested) == (CLASSES, (24, 20, 3), ())
    for split, part in (("train", dataset.train), ("val", dataset.test)):
        wanted = [array for (name, _, _), array in pixels.items() if name == split]
        np.testing.assert_array_equal(part.images, wanted)
        np.testing.assert_array_equal(part.labels, np.repeat([0, 1], len(wanted) // 2))
    inputs = describe_inputs(config(root), dataset)
    assert inputs.image_shape == (24, 20, 3)
    np.testing.assert_allclose(inputs.preprocessing.mean, dataset.train.images.mean(0) / 255, rtol=1e-5)


def test_options_of_streamed_images_are_refused(folder):
    changed = config(folder[0], image_size=64, shorter_side=(72, 80))
    message = "--data.image-size is for streamed images; .*, or stream them with --data.in-memory False"
    with pytest.raises(UserError, match=message):
        describe_inputs(changed, load_data(changed))


def test_what_is_streamed_all_the_same(folder):
    root, _ = folder
    assert isinstance(load_data(config(root, in_memory=False)), StreamedDataset)
    Image.new("RGB", (20, 25)).save(root / "val" / "bee" / "9.png")
    assert isinstance(load_data(config(root)), StreamedDataset)
    with pytest.raises(UserError, match=r"needs images of one size: the first is of 24x20 pixels, bee/9.png of 25x20"):
        load_data(config(root, in_memory=True))


def test_large_images_are_streamed_unless_wanted(tmp_path):
    for split in ("train", "val"):
        for name in CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (80, 80), (number, 0, 0)).save(tmp_path / split / name / f"{number}.png")
    assert isinstance(load_data(config(tmp_path)), StreamedDataset)
    assert load_data(config(tmp_path, in_memory=True)).image_shape == (80, 80, 3)


def test_a_broken_image_is_named(folder):
    root, _ = folder
    (root / "train" / "ant" / "0.png").write_bytes(b"no image")  # the first: the size is another's
    with pytest.raises(
        UserError, match=r"cannot read the image ant/0.png: .*; delete it, or .* --data.in-memory False"
    ):
        load_data(config(root))
    assert isinstance(load_data(config(root, in_memory=False)), StreamedDataset)


def test_a_class_without_test_images_is_known(folder):
    root, _ = folder
    for file in (root / "val" / "bee").iterdir():
        file.unlink()
    assert load_data(config(root)).untested == ("bee",)
