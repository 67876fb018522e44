"""Augmentation: every output is a window of the image, every offset, size and flip occurs, keys decide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.data.augment import area_window, normalize, random_crop, random_flip, random_lighting, scale_window


def test_normalize():
    images = jnp.arange(24, dtype=jnp.uint8).reshape(2, 2, 2, 3)
    mean, std = np.array([0.1, 0.2, 0.3], np.float32), np.array([1, 2, 4], np.float32)
    np.testing.assert_allclose(
        normalize(images, mean, std), (np.asarray(images) / 255 - mean) / std, rtol=1e-5, atol=1e-7
    )


def test_every_crop_is_a_window_and_every_window_occurs():
    # The pixel values are unique, so that the offset can be read off each crop.
    image = np.arange(1, 17, dtype=np.float32).reshape(4, 4, 1)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = {padded[y : y + 4, x : x + 4].tobytes(): (y, x) for y in range(5) for x in range(5)}
    crops = np.asarray(random_crop(jax.random.key(0), jnp.array([image] * 1000), padding=2))
    found = [windows[crop.tobytes()] for crop in crops]  # a KeyError is a crop that is no window
    counts = np.array([found.count(offset) for offset in windows.values()])
    assert (counts > 15).all()  # 40 expected
    assert (counts < 80).all()


def test_half_of_the_images_are_flipped():
    images = jax.random.normal(jax.random.key(1), (400, 3, 3, 2))
    flipped = np.asarray(random_flip(jax.random.key(0), images))
    mirrored = np.asarray(images)[:, :, ::-1]
    is_flipped = (flipped == mirrored).all((1, 2, 3))
    is_same = (flipped == np.asarray(images)).all((1, 2, 3))
    assert (is_flipped ^ is_same).all()
    assert 160 < is_flipped.sum() < 240


def test_colours_are_shifted_along_the_principal_ones():
    vectors = np.linalg.qr(np.random.RandomState(0).normal(size=(3, 3)))[0].astype(np.float32)
    images = jax.random.normal(jax.random.key(1), (500, 2, 2, 3))
    shifts = np.asarray(random_lighting(jax.random.key(0), images, vectors * np.array([4, 2, 0], np.float32)) - images)
    np.testing.assert_allclose(shifts - shifts[:, :1, :1], 0, atol=1e-5)  # each image as a whole
    along = shifts[:, 0, 0] @ vectors
    np.testing.assert_allclose(along.std(0), [4, 2, 0], rtol=0.2, atol=1e-5)


def draw(window, width, height, count=2000):
    return np.array([window(np.random.default_rng(seed), width, height) for seed in range(count)])


def test_shorter_side_is_uniform_in_the_range_and_crops_lie_anywhere():
    windows = draw(scale_window(224, (256, 480)), 500, 375)
    left, top, width, height = windows.T
    shorter = 224 * 375 / height  # of the resized image: the crop is 224 pixels of it
    assert shorter.min() == pytest.approx(256, abs=1)
    assert shorter.max() == pytest.approx(480, abs=1)
    counts, _ = np.histogram(shorter, bins=5, range=(255.5, 480.5))
    assert (abs(counts - 400) < 4 * np.sqrt(400)).all()
    assert width / height == pytest.approx(np.ones(len(width)), abs=0.01)  # the ratio is kept
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width).max() == pytest.approx(500)
    assert (top + height).max() == pytest.approx(375)
    assert left.min() == top.min() == 0


def test_the_smallest_image_is_taken_whole():
    windows = draw(scale_window(224, (224, 224)), 224, 224, count=5)
    np.testing.assert_allclose(windows, [[0, 0, 224, 224]] * 5)


def test_the_same_part_of_a_smaller_copy():
    window = scale_window(224, (256, 480))
    large, small = draw(window, 1000, 750, 100), draw(window, 500, 375, 100)
    np.testing.assert_allclose(large, 2 * small, atol=2)  # rounded to whole pixels of the resized image


def test_areas_and_ratios_of_szegedy():
    left, top, width, height = draw(area_window, 500, 400).T
    area, ratio = width * height / (500 * 400), width / height
    assert 0.075 < area.min() < 0.1
    assert area.max() > 0.9
    assert 0.74 < ratio.min() < 0.78
    assert 1.28 < ratio.max() < 1.35
    assert (left.min(), top.min()) == (0, 0)
    assert (left + width).max() == 500
    assert (top + height).max() == 400
    assert ((left + width <= 500) & (top + height <= 400)).all()


@pytest.mark.parametrize(("size", "expected"), [((900, 30), (430, 0, 40, 30)), ((30, 900), (0, 430, 30, 40))])
def test_an_image_that_no_area_fits_is_cropped_in_its_middle(size, expected):
    windows = draw(area_window, *size, 50)
    assert (windows == expected).all(1).any()
