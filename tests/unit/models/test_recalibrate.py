"""The true average of the BN statistics over several batches."""

import jax
import numpy as np
import pytest

from resnet_jax import cifar_resnet, recalibrate_bn


@pytest.fixture(scope="module")
def network():
    model = cifar_resnet(8, bn_group_size=4, running_variance="biased")
    images = jax.random.normal(jax.random.key(0), (16, 8, 8, 3)) * 2 + 1
    variables = model.init(jax.random.key(1), images, train=False)
    return model, variables, images


def test_the_statistics_are_the_average_over_all_groups(network):
    model, variables, images = network
    new = recalibrate_bn(model, variables, [images[:8], images[8:12], images[12:]])
    kernel = np.asarray(variables["params"]["stem_conv"]["kernel"])
    outputs = np.asarray(
        jax.lax.conv_general_dilated(
            images, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )
    groups = outputs.reshape(4, -1, 16)
    np.testing.assert_allclose(new["batch_stats"]["stem_bn"]["mean"], groups.mean(1).mean(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(new["batch_stats"]["stem_bn"]["var"], groups.var(1).mean(0), rtol=1e-3)
    assert new["params"] is variables["params"]
    np.testing.assert_array_equal(variables["batch_stats"]["stem_bn"]["mean"], 0)  # the old ones are untouched


def test_batches_weigh_by_their_size_and_their_order_does_not_matter(network):
    model, variables, images = network
    one = recalibrate_bn(model, variables, [images])
    other = recalibrate_bn(model, variables, [images[12:], images[:12]])
    # Groups are the same 4 images in both, so that the averages are too.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, other)


def test_a_batch_that_does_not_divide_into_groups_is_one_group(network):
    model, variables, images = network
    found = recalibrate_bn(model, variables, [images[:8], images[8:15]])["batch_stats"]
    of_groups = recalibrate_bn(model, variables, [images[:8]])["batch_stats"]
    whole = recalibrate_bn(model.clone(bn_group_size=None), variables, [images[8:15]])["batch_stats"]
    expected = jax.tree.map(lambda a, b: (8 * a + 7 * b) / 15, of_groups, whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_mistakes(network):
    model, variables, images = network
    with pytest.raises(ValueError, match="no images"):
        recalibrate_bn(model, variables, [])
    with pytest.raises(ValueError, match="frozen"):
        recalibrate_bn(model.clone(frozen_bn=True), variables, [images])
