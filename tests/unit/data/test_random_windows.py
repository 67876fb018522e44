"""Random crops: the ranges of Sec. 3.4, and the same part of an image whatever its size."""

import numpy as np
import pytest

from resnet_jax.data.augment import area_window, scale_window


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
