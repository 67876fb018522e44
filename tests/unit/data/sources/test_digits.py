"""The digits: counts, the fixed split, and pixels that follow from scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits as load_sklearn_digits

from resnet_jax.data import Dataset, load_dataset

TEST_LABELS = [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6, 6, 4, 5, 8, 1, 3, 5, 6]  # of the first 20 test images
TEST_ROW = [  # row 12 of the first of them
    *(0, 0, 1, 2, 4, 5, 16, 35, 54, 74, 80, 74, 68, 61, 63, 74),
    *(84, 94, 119, 158, 197, 236, 234, 191, 149, 106, 74, 53, 32, 11, 0, 0),
]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", "/nowhere")


def test_shapes_and_counts(digits: Dataset) -> None:
    assert digits.name == "digits"
    assert digits.class_names == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    assert digits.validation is None
    assert digits.train.images.shape == (1437, 32, 32, 3)
    assert digits.test.images.shape == (360, 32, 32, 3)
    for split in (digits.train, digits.test):
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        assert split.images.flags.c_contiguous


def test_split_is_stratified(digits: Dataset) -> None:
    whole = np.bincount(load_sklearn_digits().target)
    train, test = np.bincount(digits.train.labels), np.bincount(digits.test.labels)
    np.testing.assert_array_equal(train + test, whole)
    assert np.abs(test - whole * 360 / 1797).max() < 1


def test_split_is_fixed(digits: Dataset) -> None:
    again = load_dataset("digits", "/nowhere")
    np.testing.assert_array_equal(again.test.images, digits.test.images)
    assert digits.test.labels[:20].tolist() == TEST_LABELS


def test_images_are_the_scaled_digits(digits: Dataset) -> None:
    assert (digits.train.images[..., :1] == digits.train.images).all()  # grey
    assert digits.train.images.min() == 0
    assert digits.train.images.max() == 255
    images = np.concatenate([digits.train.images, digits.test.images])[..., 0]
    source = load_sklearn_digits()
    # Enlarging by 4 leaves the outermost 2 x 2 pixels of a corner nothing to interpolate with.
    expected = np.round(source.images[:, ::7, ::7] * 255 / 16).reshape(-1, 4)
    for offset in (0, 1):
        corners = images[:, offset :: 31 - 2 * offset, offset :: 31 - 2 * offset].reshape(-1, 4)
        assert sorted(corners.tolist()) == sorted(expected.tolist())
    # Elsewhere a block of 4 x 4 pixels averages to about its source pixel: bilinear resizing smooths.
    blocks = images.reshape(-1, 8, 4, 8, 4).mean((2, 4)) * 16 / 255
    labels = np.concatenate([digits.train.labels, digits.test.labels])
    for label in range(10):
        mean, expected = blocks[labels == label].mean(0), source.images[source.target == label].mean(0)
        assert np.corrcoef(mean.ravel(), expected.ravel())[0, 1] > 0.98


def test_known_pixels(digits: Dataset) -> None:
    assert digits.test.images[0, 12, :, 0].tolist() == TEST_ROW
