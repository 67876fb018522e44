"""Probabilities of whole sets of images beside a slow reference that takes one view at a time."""

import numpy as np
import pytest
from paths import SHARED
from slow_dense import random_variables, slow_logits

from resnet_jax.config import Config, ModelConfig
from resnet_jax.data.sources.image_folder import ImageFolder
from resnet_jax.data.splits import decoded_images
from resnet_jax.data.types import Inputs, Preprocessing
from resnet_jax.data.views import make_protocol, resize, views
from resnet_jax.inference.load import Origin, Trained
from resnet_jax.inference.predict import probabilities as compute
from resnet_jax.models import ResNet

SAMPLE = SHARED / "data" / "imagenet_sample" / "train"


def make_trained(input_size, mean):
    model = ResNet(stem="cifar", block="basic", blocks=(1, 1), filters=(4, 6), num_classes=5, shortcut="A")
    inputs = Inputs((*input_size, 3), tuple("abcde"), Preprocessing(mean, np.array([0.2, 0.3, 0.4], np.float32)))
    return Trained(model, random_variables(model, input_size), Origin(Config(model=ModelConfig(depth=8)), 0, inputs))


def softmax(logits):
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def slow_probabilities(trained, image, protocol, window):
    mean, std = trained.origin.inputs.preprocessing
    outputs = []
    if protocol.name == "multiscale":
        shown = [resize(image, scale) for scale in protocol.scales]
    else:
        shown = views(image, protocol)
    for view in shown:
        for flipped in (view, view[:, ::-1]) if protocol.name != "single" else (view,):
            here = mean if mean.ndim == 1 or mean.shape == view.shape else mean.mean((0, 1))
            normalized = ((flipped.astype(np.float64) / 255 - here) / std).astype(np.float32)
            outputs.append(softmax(slow_logits(trained.model, trained.variables, normalized, window)[0]))
    return np.mean(outputs, axis=0)


def random_images(sizes):
    random = np.random.RandomState(3)
    return [random.randint(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]


CHANNEL_MEAN = np.array([0.4, 0.5, 0.6], np.float32)
PIXEL_MEAN = np.random.RandomState(5).uniform(0.3, 0.7, (8, 8, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("protocol", "mean", "sizes"),
    [
        (make_protocol("single", (8, 8)), PIXEL_MEAN, [(8, 8)] * 7),
        (make_protocol("10crop", (8, 8)), PIXEL_MEAN, [(11, 17), (30, 9), (8, 8)]),
        (make_protocol("multiscale", (8, 8), (8, 11)), PIXEL_MEAN, [(8, 8), (13, 10), (19, 23)]),
    ],
)
def test_any_size_any_batch(protocol, mean, sizes):
    trained, images = make_trained((8, 8), mean), random_images(sizes)
    probabilities = compute(trained, images, protocol, batch_size=2).values
    assert probabilities.dtype == np.float64
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-12)
    assert probabilities.std(0).min() > 1e-3  # the images are told apart
    for image, row in zip(images, probabilities, strict=True):
        np.testing.assert_allclose(row, slow_probabilities(trained, image, protocol, (4, 4)), rtol=2e-4)
    again = compute(trained, images, protocol, batch_size=64).values
    np.testing.assert_allclose(again, probabilities, rtol=1e-4)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the ImageNet photographs (../shared/data) are not here")
def test_photographs():
    paths = sorted(str(path.relative_to(SAMPLE)) for path in SAMPLE.glob("*/*"))
    encoded = ImageFolder.of(SAMPLE, [(0, paths[0]), (57, paths[57])])
    images = decoded_images("photographs", encoded, ("a",) * 58).images
    trained = make_trained((32, 32), CHANNEL_MEAN)
    for protocol in (make_protocol("10crop", (32, 32)), make_protocol("multiscale", (32, 32), (41,))):
        probabilities = compute(trained, images, protocol, batch_size=3).values
        for image, row in zip(images, probabilities, strict=True):
            np.testing.assert_allclose(row, slow_probabilities(trained, image, protocol, (16, 16)), rtol=5e-4)
