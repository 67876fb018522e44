"""Augmentation: every output is a window of the padded image, every offset and flip occurs, keys decide."""

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.data.augment import normalize, random_crop, random_flip


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
