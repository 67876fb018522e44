"""BatchNorm against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models import BatchNorm


def images(count: int = 8) -> np.ndarray:
    return np.random.RandomState(0).normal(3, 2, (count, 4, 4, 5)).astype(np.float32)


def apply(x, *, train, variables=None, **options):
    layer = BatchNorm(**options)
    variables = variables or layer.init(jax.random.key(0), x, train=False)
    if not train:
        return layer.apply(variables, x, train=False)
    y, updates = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    return y, updates["batch_stats"]


@pytest.mark.parametrize("group_size", [None, 8, 4, 2])
def test_each_group_is_normalized_by_its_own_statistics(group_size):
    x = images()
    y, _ = apply(x, train=True, group_size=group_size)
    for start in range(0, 8, group_size or 8):
        group = slice(start, start + (group_size or 8))
        expected = (x[group] - x[group].mean((0, 1, 2))) / np.sqrt(x[group].var((0, 1, 2)) + 1e-5)
        np.testing.assert_allclose(y[group], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("running_variance", ["unbiased", "biased"])
def test_one_update_of_the_running_statistics(running_variance):
    x = images()
    _, stats = apply(x, train=True, group_size=4, decay=0.75, running_variance=running_variance)
    groups = x.reshape(2, -1, 5)
    ddof = 1 if running_variance == "unbiased" else 0
    # The old values are 0 and 1; decay is the share of the old one.
    np.testing.assert_allclose(stats["mean"], 0.25 * groups.mean(1).mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.75 + 0.25 * groups.var(1, ddof=ddof).mean(0), rtol=1e-5)


def test_evaluation_uses_the_running_statistics_and_every_parameter():
    x = images()
    variables = {
        "params": {"scale": jnp.full(5, 2.0), "bias": jnp.arange(5.0)},
        "batch_stats": {"mean": jnp.full(5, 3.0), "var": jnp.full(5, 4.0)},
    }
    y = apply(x, train=False, variables=variables, group_size=3)  # 8 images: the group size does not matter here
    np.testing.assert_allclose(y, (x - 3) / np.sqrt(4 + 1e-5) * 2 + np.arange(5), rtol=1e-5, atol=1e-5)


def test_initialization_leaves_the_running_statistics_alone():
    variables = BatchNorm().init(jax.random.key(0), images(), train=True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)


def test_equal_images_give_the_bias_and_a_finite_gradient():
    x = jnp.full((8, 4, 4, 5), 7.0)
    y, stats = apply(x, train=True)
    np.testing.assert_array_equal(y, 0)
    np.testing.assert_allclose(stats["var"], 0.9)
    gradient = jax.grad(lambda x: jnp.square(apply(x, train=True)[0]).sum())(x)
    assert np.isfinite(gradient).all()


def test_a_large_mean_does_not_spoil_the_variance():
    x = images() + 1000  # E[x^2] - E[x]^2 would be off by percents in float32
    y, _ = apply(x, train=True)
    np.testing.assert_allclose(np.asarray(y).std((0, 1, 2)), 1, rtol=1e-3)


def test_statistics_are_float32_whatever_the_activations():
    x = images().astype(jnp.bfloat16)
    y, stats = apply(x, train=True, dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype("float32")}
    expected = 0.1 * np.asarray(x, np.float64).mean((0, 1, 2))
    np.testing.assert_allclose(stats["mean"], expected, rtol=1e-5)  # a bfloat16 sum has 2-3 digits


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="8 images does not divide into BN groups of 3"):
        apply(images(), train=True, group_size=3)
