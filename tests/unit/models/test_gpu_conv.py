"""The convolution for GPUs against XLA's own, forward and backward, and which network takes it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_dense import random_variables

from resnet_jax import create_model
from resnet_jax.models import cpu_conv, gpu_conv
from resnet_jax.models.backend import for_this_backend
from resnet_jax.models.fully_convolutional import fully_convolutional_logits

LAYOUT = ("NHWC", "HWIO", "NHWC")


@partial(jax.jit, static_argnums=(0, 4))
def both_ways(convolve, x, kernel, dy, padding):
    """The output and the two gradients, with stride 2."""
    y, vjp = jax.vjp(lambda x, k: convolve(x, k, (2, 2), padding, dimension_numbers=LAYOUT), x, kernel)
    return (y, *vjp(dy))


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("size", [(16, 16), (15, 17), (16, 13)])
@pytest.mark.parametrize(
    ("channels", "window", "padding"),
    [(3, (7, 7), ((3, 3), (3, 3))), (1, (3, 4), ((1, 0), (0, 3))), (4, (2, 5), ((0, 0), (2, 1)))],
)
def test_value_and_gradients_are_those_of_xla(size, channels, window, padding):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, *size, channels)), rng.normal(size=(*window, channels, 5))
    outputs = [(n + sum(pad) - k) // 2 + 1 for n, k, pad in zip(size, window, padding, strict=True)]
    dy = rng.normal(size=(2, *outputs, 5))
    ours = both_ways(gpu_conv.conv_general_dilated, x, kernel, dy, padding)
    theirs = both_ways(jax.lax.conv_general_dilated, x, kernel, dy, padding)
    for found, expected in zip(ours, theirs, strict=True):
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def kernels(channels, filters, strides, size, dtype, **options):
    """The shapes of all kernels in the program of one convolution."""
    x, kernel = jnp.zeros((2, 14, 15, channels), dtype), jnp.zeros((size, size, channels, filters), dtype)
    margins = [(size // 2, size // 2)] * 2
    convolve = partial(gpu_conv.conv_general_dilated, dimension_numbers=LAYOUT, **options)
    program = jax.make_jaxpr(lambda x, k: convolve(x, k, strides, margins))(x, kernel)
    return [eqn.invars[1].aval.shape for eqn in program.eqns if eqn.primitive.name == "conv_general_dilated"]


def test_only_the_stem_of_an_imagenet_network_is_packed():
    """A packed pixel is a multiple of 16 bytes: 12 channels of four bytes, but 16 of two."""
    assert kernels(3, 64, (2, 2), 7, jnp.float32) == [(4, 4, 12, 64)]
    assert kernels(3, 64, (2, 2), 7, jnp.bfloat16) == [(4, 4, 16, 64)]
    assert kernels(3, 16, (1, 1), 3, jnp.float32) == [(3, 3, 3, 16)]  # of CIFAR networks and of VGG
    assert kernels(64, 128, (2, 2), 3, jnp.float32) == [(3, 3, 64, 128)]
    assert kernels(3, 8, (2, 2), 3, jnp.float32, rhs_dilation=(2, 1)) == [(3, 3, 3, 8)]


@pytest.mark.parametrize("size", [32, 45])
def test_a_network_is_the_same_function_of_the_same_variables(size):
    model = create_model("resnet18", num_classes=3).clone(blocks=(1,), filters=(8,))
    images = jax.random.normal(jax.random.key(0), (3, size, size, 3))
    variables = random_variables(model, (32, 32))
    packed = model.clone(conv_general_dilated=gpu_conv.conv_general_dilated)
    apply = jax.jit(lambda model, *args: model.apply(*args, train=False), static_argnums=0)
    np.testing.assert_allclose(apply(packed, variables, images), apply(model, variables, images), rtol=1e-4, atol=1e-5)
    sizes = jnp.array([[size, size - 1], [33, 32], [32, size]]) if size > 32 else None
    everywhere = [fully_convolutional_logits(m, variables, images, sizes, (32, 32)) for m in (packed, model)]
    np.testing.assert_allclose(*everywhere, rtol=1e-4, atol=1e-5)


def test_each_backend_has_its_convolution(monkeypatch):
    model = create_model("resnet18")
    for backend, expected in [("gpu", gpu_conv.conv_general_dilated), ("tpu", jax.lax.conv_general_dilated)]:
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert for_this_backend(model).conv_general_dilated is expected
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    conv = for_this_backend(model).conv_general_dilated
    assert (conv.func, conv.keywords) == (cpu_conv.conv_general_dilated, {"parts": jax.device_count()})
