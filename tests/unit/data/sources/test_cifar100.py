"""CIFAR-100: both official forms give the same images, with fine and coarse labels."""

import functools
import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
from image_files import write
from paths import ROOT

from resnet_jax.cli.arguments import parse_config
from resnet_jax.data import load_dataset
from resnet_jax.data.sources import cifar100
from resnet_jax.errors import UserError

COUNTS = {"train": 30, "test": 10}  # instead of 50,000 and 10,000


@functools.cache
def made_up(name):
    """Planes [N, 3072], coarse labels [N] and fine labels [N]."""
    random, count = np.random.RandomState(len(name)), COUNTS[name]
    planes = random.randint(0, 256, (count, 3072)).astype(np.uint8)
    return planes, random.randint(0, 20, count).astype(np.uint8), random.randint(0, 100, count).astype(np.uint8)


def binary_files():
    """Each record: coarse label, fine label, pixels."""
    files = {}
    for name in COUNTS:
        planes, coarse, fine = made_up(name)
        files[f"{name}.bin"] = np.column_stack([coarse, fine, planes]).tobytes()
    return files


def python_files():
    files = {}
    for name in COUNTS:
        planes, coarse, fine = made_up(name)
        content = {b"data": planes, b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist()}
        files[name] = pickle.dumps(content, protocol=2)
    return files


FORMS = {"cifar-100-binary": binary_files, "cifar-100-python": python_files}


def archive(folder):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in FORMS[folder]().items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    archives = {folder: archive(folder) for folder in FORMS}
    monkeypatch.setattr(cifar100, "RECORDS", {f"{name}.bin": count for name, count in COUNTS.items()})
    monkeypatch.setattr(cifar100, "PICKLES", {n: hashlib.md5(c).hexdigest() for n, c in python_files().items()})
    sums = {f"{folder}.tar.gz": hashlib.sha256(content).hexdigest() for folder, content in archives.items()}
    monkeypatch.setattr(cifar100, "SHA256", sums)
    monkeypatch.setattr(cifar100, "URL", "http://127.0.0.1:1/no-test-downloads.tar.gz")
    return archives


def check(dataset, coarse):
    assert (dataset.name, dataset.num_classes) == (("cifar100-coarse", 20) if coarse else ("cifar100", 100))
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        planes, *labels = made_up(name)
        np.testing.assert_array_equal(split.labels, labels[0 if coarse else 1])
        assert split.images.shape == (COUNTS[name], 32, 32, 3)
        for image, row, column, channel in ((0, 0, 1, 0), (9, 31, 30, 2), (5, 1, 0, 1)):
            assert split.images[image, row, column, channel] == planes[image, 1024 * channel + 32 * row + column]


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("folder", FORMS)
def test_folders_and_archives(tmp_path, small_files, folder, coarse):
    name = "cifar100-coarse" if coarse else "cifar100"
    write(tmp_path / "folder" / folder, FORMS[folder]())
    check(load_dataset(name, tmp_path / "folder"), coarse)
    check(load_dataset(name, tmp_path / "folder" / folder), coarse)
    write(tmp_path / "packed", {f"{folder}.tar.gz": small_files[folder]})
    check(load_dataset(name, tmp_path / "packed"), coarse)


def test_classes():
    assert (len(set(cifar100.FINE)), len(set(cifar100.COARSE))) == (100, 20)
    assert list(cifar100.FINE) == sorted(cifar100.FINE)
    assert (cifar100.FINE[0], cifar100.FINE[52], cifar100.FINE[99]) == ("apple", "oak_tree", "worm")
    assert cifar100.COARSE[11] == "large_omnivores_and_herbivores"


@pytest.mark.parametrize(
    ("name", "label", "message"),
    [
        ("cifar100", (3, 100), "label 100 of image 4 is outside 0..99"),
        ("cifar100-coarse", (20, 3), "label 20 of image 4 is outside 0..19"),
    ],
)
def test_labels_that_are_none(tmp_path, name, label, message):
    files = binary_files()
    content = bytearray(files["train.bin"])
    content[4 * 3074 : 4 * 3074 + 2] = bytes(label)
    write(tmp_path, {**files, "train.bin": bytes(content)})
    with pytest.raises(UserError, match=f"train.bin: {message}; take it anew from cifar-100-binary.tar.gz"):
        load_dataset(name, tmp_path)


def test_without_a_network_the_way_out_is_named(tmp_path):
    with pytest.raises(UserError, match="could not download CIFAR-100 .* put cifar-100-binary.tar.gz from https"):
        load_dataset("cifar100", tmp_path)


def test_its_configuration_is_the_papers_recipe_for_cifar10():
    theirs, ours = (parse_config([str(ROOT / "configs" / f"{name}_resnet56.py")]) for name in ("cifar10", "cifar100"))
    assert ours.data.name == "cifar100"
    assert (ours.model, ours.optim, ours.run.steps) == (theirs.model, theirs.optim, theirs.run.steps)
