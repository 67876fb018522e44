"""BatchNorm against NumPy and PyTorch."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models import BatchNorm
from resnet_jax.models.norm import normalize_groups

FORMS = ["cpu", "gpu"]  # how groups are summed up on other backends does not matter to the numbers


def on(backend):
    """Trace a program as it would be on a backend."""
    return mock.patch.object(jax, "default_backend", return_value=backend)


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


def normalized(x, scale, bias, dy):
    """Normalized groups x [G, N, H, W, C], mean and variance [G, C], and gradients, by the formulas in float64."""
    x, scale, bias, dy = (np.asarray(array, np.float64) for array in (x, scale, bias, dy))
    inside = (1, 2, 3)
    mean, var = x.mean(inside, keepdims=True), x.var(inside, keepdims=True)
    inverse = 1 / np.sqrt(var + 1e-5)
    z = (x - mean) * inverse
    dz = dy * scale
    dx = inverse * (dz - dz.mean(inside, keepdims=True) - z * (dz * z).mean(inside, keepdims=True))
    flat = (0, *inside)
    return (z * scale + bias, mean.squeeze(inside), var.squeeze(inside)), (dx, (dy * z).sum(flat), dy.sum(flat))


def ours(x, scale, bias, dy, *, dtype=jnp.float32):
    outputs, pull = jax.vjp(lambda *inputs: normalize_groups(*inputs, 1e-5, jnp.dtype(dtype)), x, scale, bias)
    return outputs, pull((dy, *map(jnp.zeros_like, outputs[1:])))


def distance(found, expected, size=None):
    """The largest difference, as a share of the largest value or of `size`."""
    return np.abs(np.asarray(found, np.float64) - expected).max() / (size or np.abs(expected).max())


def assert_same(found, expected, dy):
    """Compare outputs and gradients; those of scale and bias are sums of as many terms as dy has for a channel."""
    terms = np.abs(dy).sum() / dy.shape[-1]
    sizes = [None] * 4 + [terms] * 2
    leaves = (jax.tree.leaves(tree) for tree in (found, expected))
    for ours_, theirs, size in zip(*leaves, sizes, strict=True):
        assert distance(ours_, theirs, size) < 5e-6


# Rows of 128 on GPUs hold 8, 4, 2 pixels, 1, part of one; 3 channels and 5 x 7 pixels of 32 make none.
@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("shape", [(4, 8, 8, 16), (2, 4, 4, 32), (2, 4, 4, 64), (2, 3, 3, 128), (2, 2, 2, 256),
                                   (4, 8, 8, 3), (1, 5, 7, 32)])  # fmt: skip
def test_values_and_gradients_are_those_of_float64(backend, shape):
    random = np.random.RandomState(1)
    x, dy = random.normal(3, 2, (2, 2, *shape)).astype(np.float32)
    scale, bias = random.normal(1, 1, (2, shape[-1])).astype(np.float32)
    with on(backend):
        found = jax.jit(ours)(x, scale, bias, dy)
    assert_same(found, normalized(x, scale, bias, dy), dy)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("offset", [1e2, 1e4, -1e4])
def test_a_large_mean_spoils_neither_variance_nor_gradient(backend, offset):
    """E[x^2] - E[x]^2 would have no digit left: 1e8 + 1 is 1e8 in float32."""
    random = np.random.RandomState(2)
    x, dy = random.normal(0, 1, (2, 2, 8, 8, 8, 16)).astype(np.float32)
    x += np.float32(offset)  # which rounds it to 1e-3; the formulas take what is left
    with on(backend):
        outputs, gradients = ours(x, jnp.ones(16), jnp.zeros(16), dy)
    (y, _, var), expected = normalized(x, np.ones(16), np.zeros(16), dy)
    assert distance(outputs[2], var) < 1e-5
    tolerance = 2 * abs(offset) * 2**-24  # the mean itself is a float32, and what lies around it is divided by 1
    assert np.abs(outputs[0] - y).max() < tolerance + 1e-5
    assert distance(gradients[0], expected[0]) < tolerance + 1e-5


def test_it_is_batch_norm_of_pytorch():
    torch = pytest.importorskip("torch")
    random = np.random.RandomState(3)
    x, dy = random.normal(3, 2, (2, 1, 6, 8, 8, 16)).astype(np.float32)
    scale, bias = random.normal(1, 1, (2, 16)).astype(np.float32)
    found = ours(x, scale, bias, dy)
    inputs = [
        torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x[0].transpose(0, 3, 1, 2), scale, bias)
    ]
    mean, var = torch.zeros(16).double(), torch.zeros(16).double()
    y = torch.nn.functional.batch_norm(inputs[0], mean, var, *inputs[1:], training=True, momentum=1.0, eps=1e-5)
    y.backward(torch.tensor(dy[0].transpose(0, 3, 1, 2).astype(float)))
    y, dx = (tensor.detach().numpy().transpose(0, 2, 3, 1)[None] for tensor in (y, inputs[0].grad))
    biased = var * (1 - 1 / (6 * 8 * 8))  # PyTorch's running variance is unbiased
    sums = [tensor.grad.numpy() for tensor in inputs[1:]]
    assert_same(found, ((y, mean[None].numpy(), biased[None].numpy()), (dx, *sums)), dy)


@pytest.mark.parametrize("remat", [False, True])
def test_the_backward_pass_keeps_nothing_of_the_size_of_bfloat16_activations_in_float32(remat):
    layer = BatchNorm(dtype=jnp.bfloat16)
    x = images().astype(jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x, train=False)

    def normalize(x):
        return layer.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    normalize = jax.checkpoint(normalize) if remat else normalize
    y, pull = jax.vjp(normalize, x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= x.size]
    assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]
    assert pull(y)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("backend", FORMS)
def test_each_group_is_read_once_forward_and_once_backward(backend):
    """One sum of all that is summed: XLA would sum again for each use."""
    x = jnp.zeros((2, 2, 8, 8, 16))
    with on(backend):
        program = jax.jit(ours).lower(x, jnp.ones(16), jnp.zeros(16), x).as_text()
    assert program.count("stablehlo.optimization_barrier") == 2


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
