"""The fully convolutional form beside a slow reference that slides a window by hand, image by image."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_dense import random_variables, slow_logits

from resnet_jax.models import ResNet
from resnet_jax.models.borders import Borders
from resnet_jax.models.fully_convolutional import _slide_vgg, fully_convolutional_logits
from resnet_jax.models.vgg import VGG

# Two stages: maps of a quarter of the width would be no other case.
SMALL = ResNet(stem="cifar", block="basic", blocks=(1, 1), filters=(4, 6), num_classes=5, shortcut="A")


def imagenet(block, **options):
    return ResNet(stem="imagenet", block=block, blocks=(1, 2), filters=(4, 6), num_classes=5, **options)


@pytest.mark.parametrize(
    ("model", "input_size", "window", "sizes"),
    [
        (SMALL, (8, 12), (4, 6), [(8, 12), (13, 17)]),
        (imagenet("basic", shortcut="A", pool_padding="caffe", scan_blocks=True), (32, 32), (4, 4), [(35, 48)]),
        (imagenet("bottleneck", shortcut="B", pool_padding="torch", stride_on="3x3"), (32, 32), (4, 4), [(34, 43)]),
    ],
)
def test_images_of_any_size_in_one_batch(model, input_size, window, sizes):
    variables = random_variables(model, input_size)
    height, width = (max(size[i] for size in sizes) + 3 for i in (0, 1))
    # Beyond the borders, too, there are numbers.
    batch = np.random.RandomState(1).normal(0, 5, (len(sizes), height, width, 3)).astype(np.float32)
    logits = jax.jit(fully_convolutional_logits, static_argnums=(0, 4))(
        model, variables, batch, np.array(sizes), input_size
    )
    assert logits.shape == (len(sizes), 5)
    assert logits.dtype == jnp.float32
    for image, (rows, columns), row in zip(batch, sizes, np.asarray(logits), strict=True):
        expected, usual = slow_logits(model, variables, image[:rows, :columns], window)
        np.testing.assert_allclose(row, expected, rtol=1e-4)
        if (rows, columns) == input_size:
            np.testing.assert_allclose(row, usual, rtol=1e-4)
        else:
            assert (
                np.abs(row - usual).max() > 1e-3 * np.abs(usual).max()
            )  # one pool over all of the map is another thing


def test_full_arrays_need_no_sizes():
    model = SMALL
    variables = random_variables(model, (8, 8))
    images = np.random.RandomState(0).normal(0, 1, (3, 13, 10, 3)).astype(np.float32)
    compute = jax.jit(fully_convolutional_logits, static_argnums=(0, 4))
    sizes = np.full((3, 2), (13, 10))
    np.testing.assert_allclose(
        compute(model, variables, images, None, (8, 8)), compute(model, variables, images, sizes, (8, 8)), rtol=1e-4
    )


def test_vgg_slides_its_fully_connected_layers():
    random = np.random.RandomState(0)
    channels, hidden = 3, 8
    params = {
        name: {"kernel": random.normal(0, 0.1, shape), "bias": random.normal(0, 0.1, shape[1])}
        for name, shape in (("fc6", (7 * 7 * channels, hidden)), ("fc7", (hidden, hidden)), ("fc8", (hidden, 4)))
    }
    maps = random.normal(0, 1, (2, 9, 11, channels))
    extents = [(8, 11), (9, 7)]
    got = _slide_vgg(params, jnp.asarray(maps, jnp.float32), jnp.array(extents))
    for logits, feature_map, (height, width) in zip(np.asarray(got), maps, extents, strict=True):
        at_positions = []
        for top in range(height - 6):
            for left in range(width - 6):
                x = feature_map[top : top + 7, left : left + 7].reshape(-1)
                for name in ("fc6", "fc7"):
                    x = np.maximum(x @ params[name]["kernel"] + params[name]["bias"], 0)
                at_positions.append(x @ params["fc8"]["kernel"] + params["fc8"]["bias"])
        np.testing.assert_allclose(logits, np.mean(at_positions, 0), rtol=1e-4, atol=1e-5)


def test_vgg_sees_padding_beyond_the_border():
    model = VGG(convs=(1, 1, 0, 0, 0), num_classes=3, backbone_only=True)
    variables = random_variables(model, (32, 32))
    image = np.random.RandomState(0).normal(0, 1, (1, 20, 23, 3)).astype(np.float32)

    @jax.jit
    def within(image, sizes):
        borders = Borders(image, sizes)
        with nn.intercept_methods(borders.respect):
            feature_map = model.apply(variables, image, train=False)["conv2"]
        return feature_map, borders.of(feature_map)

    feature_map, extents = within(image, np.array([(15, 17)]))
    alone = jax.jit(lambda image: model.apply(variables, image, train=False)["conv2"])(image[:, :15, :17])
    assert extents.tolist() == [[3, 4]] == [list(alone.shape[1:3])]
    np.testing.assert_allclose(feature_map[:, :3, :4], alone, rtol=1e-4, atol=1e-5)
    assert np.abs(alone).max() > 0.1
