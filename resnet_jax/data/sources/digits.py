"""Handwritten digits that come with scikit-learn: a small real data set that needs no download."""

from __future__ import annotations

import numpy as np
from PIL import Image

from resnet_jax.data.types import Dataset, Split
from resnet_jax.errors import optional

IMAGE_SIZE = 32  # pixels; that of CIFAR-10, so that the networks of Sec. 4.2 take the digits as they are
TEST_IMAGES = 360  # of 1,797


def load_digits() -> Dataset:
    """Return the digits as images [N, 32, 32, 3] uint8: always the same 1,437 to train on and 360 to test.

    Raises:
      UserError: scikit-learn is not installed.
    """
    optional("sklearn", extra="digits", package="scikit-learn")
    from sklearn import datasets, model_selection  # slow to import

    digits = datasets.load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # [N, 8, 8], 0..16 -> 0..255
    size = (IMAGE_SIZE, IMAGE_SIZE)
    resized = [Image.fromarray(image).resize(size, Image.Resampling.BILINEAR) for image in grey]
    grey = np.stack([np.asarray(image) for image in resized])
    images = np.repeat(grey[..., None], 3, axis=-1)  # [N, 32, 32, 3]
    train_images, test_images, train_labels, test_labels = model_selection.train_test_split(
        images, digits.target, test_size=TEST_IMAGES, stratify=digits.target, random_state=0
    )
    return Dataset(
        name="digits",
        train=Split(train_images, train_labels.astype(np.int32)),
        test=Split(test_images, test_labels.astype(np.int32)),
        class_names=tuple(str(digit) for digit in range(10)),
    )
