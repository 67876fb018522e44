"""split_validation, and load_dataset's names."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from resnet_jax.data import Dataset, Split, load_dataset, split_validation
from resnet_jax.errors import UserError


def numbered(count: int) -> Dataset:
    """A data set whose image number i is filled with i and has label i % 3."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 2, 2, 3)).copy()
    split = Split(images, np.arange(count, dtype=np.int32) % 3)
    return Dataset("numbered", split, split, ("a", "b", "c"))


def test_split_validation_parts_train() -> None:
    dataset = numbered(100)
    split = split_validation(dataset, 30, seed=0)
    assert split.validation is not None
    assert (len(split.train), len(split.validation)) == (70, 30)
    numbers = np.concatenate([split.train.images, split.validation.images])[:, 0, 0, 0]
    assert sorted(numbers.tolist()) == list(range(100))  # disjoint, and all of them
    for part in (split.train, split.validation):
        np.testing.assert_array_equal(part.labels, part.images[:, 0, 0, 0] % 3)
    assert split.test is dataset.test
    assert dataset.validation is None  # the argument is left as it was
    assert len(dataset.train) == 100


def test_split_validation_is_seeded() -> None:
    def chosen(seed: int) -> list[int]:
        validation = split_validation(numbered(100), 10, seed).validation
        assert validation is not None
        return validation.images[:, 0, 0, 0].tolist()

    assert chosen(0) == chosen(0)
    assert chosen(0) != chosen(1)
    assert chosen(0) == sorted(np.random.RandomState(0).permutation(100)[:10].tolist())


@pytest.mark.parametrize("size", [-1, 0, 100, 101])
def test_split_validation_refuses(size: int) -> None:
    with pytest.raises(UserError, match=f"--data.validation-size {size}: choose between 1 and 99"):
        split_validation(numbered(100), size, seed=0)


@pytest.mark.parametrize(
    ("name", "hint"), [("cifar-10", "did you mean cifar10"), ("ImageNet", "did you mean imagenet"), ("xyz", "choose")]
)
def test_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"unknown data set '{name}'.*{hint}"):
        load_dataset(name, "/nowhere")


@pytest.mark.parametrize(
    ("name", "module", "extra", "package"),
    [
        ("digits", "sklearn", "digits", "scikit-learn"),
        ("tfds:mnist", "tensorflow_datasets", "tfds", "tensorflow-datasets"),
    ],
)
def test_what_is_not_installed(
    name: str, module: str, extra: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs {package}, of the extra \[{extra}\]: pip install {package}"):
        load_dataset(name, "/nowhere")


def test_imagenet_says_what_is_not_there() -> None:
    with pytest.raises(UserError, match="no folder /nowhere/train: the data folder must hold train/CLASS/FILE"):
        load_dataset("imagenet", "/nowhere")
