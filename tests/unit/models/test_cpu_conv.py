"""The convolution for CPUs against XLA's own, forward and backward."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models import cpu_conv

LAYOUT = ("NHWC", "HWIO", "NHWC")


def both_ways(convolve, x, kernel, dy):
    """The output and the two gradients."""
    y, vjp = jax.vjp(convolve, x, kernel)
    return (y, *vjp(dy))


@pytest.mark.parametrize(
    ("height", "width", "channels", "filters", "size", "stride"),
    [
        (8, 8, 16, 16, 3, 1),  # two pixels at once, in both directions
        (9, 7, 3, 8, 3, 1),  # an odd width: one pixel at once
        (6, 8, 8, 32, 3, 1),  # wide forward, narrow backward
        (8, 10, 16, 32, 3, 2),
        (9, 7, 5, 6, 3, 2),
        (8, 8, 6, 7, 1, 1),
        (9, 8, 6, 7, 1, 2),
        (16, 14, 3, 8, 7, 2),
        (8, 8, 4, 4, 5, 1),
    ],
)
@pytest.mark.parametrize("parts", [1, 2])
def test_same_numbers_as_xla(height, width, channels, filters, size, stride, parts, monkeypatch):
    monkeypatch.setattr(cpu_conv, "_CACHE_BYTES", 2**13)  # so that the filter gradient takes several turns
    random = np.random.RandomState(0)
    x = jnp.array(random.normal(size=(4, height, width, channels)).astype(np.float32))
    kernel = jnp.array(random.normal(size=(size, size, channels, filters)).astype(np.float32))
    options = {"window_strides": (stride, stride), "padding": [(size // 2, size // 2)] * 2}
    xla = partial(jax.lax.conv_general_dilated, dimension_numbers=LAYOUT, **options)
    numbers = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, LAYOUT)
    ours = partial(cpu_conv.conv_general_dilated, parts=parts, dimension_numbers=numbers, **options)

    dy = jnp.array(random.normal(size=jax.eval_shape(xla, x, kernel).shape).astype(np.float32))
    expected = jax.jit(partial(both_ways, xla))(x, kernel, dy)
    actual = jax.jit(partial(both_ways, ours))(x, kernel, dy)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ("margins", "out"), [(((0, 0), (0, 0)), (6, 6)), (((2, 1), (0, 2)), (9, 8)), (((0, 2), (2, 2)), (8, 10))]
)
def test_uneven_padding(margins, out):
    x, kernel = jnp.linspace(-1, 1, 2 * 64 * 4).reshape(2, 8, 8, 4), jnp.linspace(-1, 1, 9 * 20).reshape(3, 3, 4, 5)
    xla = partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding=margins, dimension_numbers=LAYOUT)
    ours = partial(cpu_conv.conv_general_dilated, window_strides=(1, 1), padding=margins)
    ours = partial(ours, dimension_numbers=jax.lax.conv_dimension_numbers(x.shape, kernel.shape, LAYOUT))
    dy = jnp.cos(jnp.arange(2.0 * out[0] * out[1] * 5)).reshape(2, *out, 5)
    for a, b in zip(both_ways(ours, x, kernel, dy), both_ways(xla, x, kernel, dy), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_bfloat16_images_keep_their_dtype_and_are_summed_in_float32():
    x = jnp.ones((4, 8, 8, 2), jnp.bfloat16)
    kernel = jnp.ones((3, 3, 2, 16), jnp.bfloat16)
    numbers = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, LAYOUT)
    ours = partial(
        cpu_conv.conv_general_dilated, window_strides=(1, 1), padding=[(1, 1)] * 2, dimension_numbers=numbers
    )
    y, dx, dkernel = both_ways(ours, x, kernel, jnp.ones((4, 8, 8, 16), jnp.bfloat16))
    assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.bfloat16,) * 3
    assert (dkernel[1, 1] == 4 * 64).all()  # every pixel; bfloat16 sums of ones would stop at 256 as well
    assert (dkernel[0, 0] == 4 * 49).all()  # exact, where a sum in bfloat16 would round


@pytest.mark.parametrize("option", [{"feature_group_count": 2}, {"rhs_dilation": (2, 2)}, {"dimension_numbers": None}])
def test_what_it_does_not_do_is_refused(option):
    x, kernel = jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 4, 4))
    numbers = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, LAYOUT)
    with pytest.raises(ValueError, match="neither dilation nor groups"):
        cpu_conv.conv_general_dilated(x, kernel, (1, 1), [(1, 1)] * 2, **{"dimension_numbers": numbers, **option})
