"""Mean image and principal colours."""

import io

import numpy as np
import pytest
from PIL import Image

from resnet_jax.data.decode import BrokenImageError, encode_raw
from resnet_jax.data.splits import split_validation
from resnet_jax.data.tools.statistics import compute_statistics, find_statistics, load_statistics, save_statistics
from resnet_jax.data.types import StreamedDataset
from resnet_jax.data.views import make_protocol, views
from resnet_jax.errors import UserError

RANDOM = np.random.RandomState(0)
# Colours that vary most along one direction.
IMAGES = [
    np.clip(RANDOM.normal(120, 40, (40 + 3 * i, 50, 1)) + RANDOM.normal(0, 10, (40 + 3 * i, 50, 3)), 0, 255).astype(
        np.uint8
    )
    for i in range(40)
]


class InMemory:
    def __init__(self, broken=()):
        self.broken = broken

    def __len__(self):
        return len(IMAGES)

    def id(self, index):
        return str(index)

    def read(self, index):
        if index in self.broken:
            raise BrokenImageError("made to fail")
        return encode_raw(IMAGES[index]), 0


def test_mean_and_eigenvectors_of_all_pixels():
    broken = (3,)
    statistics = compute_statistics(InMemory(broken), 32)
    assert (statistics.images, statistics.broken) == (40, 1)
    protocol = make_protocol("single", (32, 32))
    crops = np.stack([views(image, protocol)[0] for i, image in enumerate(IMAGES) if i not in broken]) / 255
    np.testing.assert_allclose(statistics.mean, crops.mean(0), rtol=1e-5)
    covariance = np.cov(crops.reshape(-1, 3).T, bias=True)
    values, vectors = statistics.eigenvalues, statistics.eigenvectors
    np.testing.assert_allclose(vectors @ np.diag(values) @ vectors.T, covariance, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-5)
    assert values[0] > 5 * values[1] > values[2] > 0
    np.testing.assert_allclose(np.abs(vectors[:, 0]), np.full(3, 3**-0.5), atol=0.02)
    np.testing.assert_allclose(statistics.lighting @ [1, 0, 0], values[0] * vectors[:, 0], rtol=1e-6)


def test_nothing_that_can_be_read():
    with pytest.raises(UserError, match="none of the 40 training images"):
        compute_statistics(InMemory(range(40)), 32)


def dataset(folder, name="folder"):
    return StreamedDataset(name, folder, InMemory(), InMemory(), ("a",))


def test_they_are_stored_beside_the_data(tmp_path):
    statistics = compute_statistics(InMemory(), 32)
    assert save_statistics(statistics, tmp_path) == tmp_path / "statistics.npz"
    loaded = load_statistics(dataset(tmp_path), tmp_path)
    for found, expected in zip(loaded, statistics, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_those_of_a_small_set_are_computed_and_put_beside_it(tmp_path, monkeypatch):
    expected = compute_statistics(InMemory(), 32)
    for folder in (tmp_path, tmp_path / "nowhere"):  # where nothing can be written
        found = find_statistics(dataset(folder), folder, 32, workers=1)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)
    held_out = split_validation(dataset(tmp_path), 5, 0)  # which are images to train on, too
    monkeypatch.setattr("resnet_jax.data.tools.statistics.compute_statistics", None)
    for data in (dataset(tmp_path), held_out):
        np.testing.assert_array_equal(find_statistics(data, tmp_path, 32, workers=1).mean, expected.mean)
    monkeypatch.setattr("resnet_jax.data.tools.statistics._SMALL", 39)
    with pytest.raises(UserError, match=r"no .*nowhere/statistics.npz.*: python -m resnet_jax data statistics"):
        find_statistics(dataset(tmp_path / "nowhere"), tmp_path / "nowhere", 32, workers=1)


def test_mistakes_name_the_file_and_the_command(tmp_path):
    with pytest.raises(UserError, match=r"no .*statistics.npz.*: python -m resnet_jax data statistics"):
        load_statistics(dataset(tmp_path), tmp_path)
    with pytest.raises(UserError, match="--name tfds:imagenet2012"):
        load_statistics(dataset(tmp_path, "tfds:imagenet2012"), tmp_path)
    statistics = compute_statistics(InMemory(), 32)
    save_statistics(statistics._replace(images=41), tmp_path)
    with pytest.raises(UserError, match=r"statistics.npz is of 41 training images, but there are 40"):
        load_statistics(dataset(tmp_path), tmp_path)
    (tmp_path / "statistics.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"cannot read .*statistics.npz"):
        load_statistics(dataset(tmp_path), tmp_path)


def test_a_png_counts_as_its_pixels(tmp_path):
    file = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(file, "PNG")

    class One(InMemory):
        def __len__(self):
            return 1

        def read(self, index):
            return file.getvalue(), 0

    statistics = compute_statistics(One(), 32)
    expected = views(IMAGES[0], make_protocol("single", (32, 32)))[0] / 255
    np.testing.assert_allclose(statistics.mean, expected, rtol=1e-6)
