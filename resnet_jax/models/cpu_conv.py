"""Convolutions for XLA:CPU, whose own backward pass is slow; the networks take this as conv_general_dilated.

The numbers are the same up to rounding. docs/performance.md has the measurements behind each choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

_LAYOUT = ("NHWC", "HWIO", "NHWC")  # the one layout that XLA:CPU has a fast convolution for inside loops
_NARROW = 16  # filters up to which making two pixels at once is faster
_CACHE_BYTES = 2**19  # what one product of the filter gradient reads should stay in the L2 cache

Strides = tuple[int, int]
Pads = tuple[tuple[int, int], tuple[int, int]]


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    *,
    parts: int = 1,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
) -> jax.Array:
    """Convolve, to be differentiated in reverse mode only; the arguments are those of jax.lax.conv_general_dilated.

    Args:
      lhs: images [N, H, W, Ci].
      rhs: kernel [h, w, Ci, Co].
      window_strides: of height and width.
      padding: ((top, bottom), (left, right)).
      parts: devices that the images are spread over; each sums its part of the filter gradient by itself.
      lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, precision: as flax.linen.Conv passes them
        for an ordinary convolution of NHWC images.

    Raises:
      ValueError: a dilated, grouped or transposed convolution, which the paper's networks do not have.
    """
    del precision
    ordinary = set(lhs_dilation or ()) <= {1} and set(rhs_dilation or ()) <= {1} and feature_group_count == 1
    layout = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, _LAYOUT)
    if not ordinary or jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) != layout:
        raise ValueError("the convolution for CPUs takes neither dilation nor groups, and NHWC images only")
    (top, bottom), (left, right) = padding
    vertical, horizontal = window_strides
    return _conv(lhs, rhs, (vertical, horizontal), ((top, bottom), (left, right)), parts)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads, parts: int) -> jax.Array:
    del parts
    return _convolve(x, kernel, strides, pads)


def _forward(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads, parts: int) -> Any:
    return _conv(x, kernel, strides, pads, parts), (x, kernel)


def _backward(strides: Strides, pads: Pads, parts: int, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    dx = _input_gradient(dy, kernel, x.shape, strides, pads)
    dkernel = _filter_gradient(x, dy, kernel.shape, strides, pads, parts)
    return dx, dkernel.astype(kernel.dtype)


_conv.defvjp(_forward, _backward)


def _convolve(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads) -> jax.Array:
    """Convolve; a kernel with few filters makes two neighbouring pixels at once.

    The matrix product inside a convolution has as many columns as there are filters, and 16 are too few for it.
    A kernel one pixel wider, with stride 2, has twice as many: the filters of the left pixel and, shifted by
    one, those of the right. A third more multiplications in 2/3 of the time.
    """
    height, width, c, filters = kernel.shape
    out_width = x.shape[2] + sum(pads[1]) - width + 1
    if filters > _NARROW or width == 1 or strides != (1, 1) or out_width % 2:
        return jax.lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_LAYOUT)
    margins = ((0, 1), (1, 0))  # beside the filters of the left pixel, of the right
    both = jnp.stack([jnp.pad(kernel, ((0, 0), margin, (0, 0), (0, 0))) for margin in margins], 3)
    both = both.reshape(height, width + 1, c, 2 * filters)  # from [h, w + 1, Ci, 2, Co]
    y = jax.lax.conv_general_dilated(x, both, (1, 2), pads, dimension_numbers=_LAYOUT)
    return y.reshape(*y.shape[:2], out_width, filters)


def _input_gradient(
    dy: jax.Array, kernel: jax.Array, shape: tuple[int, ...], strides: Strides, pads: Pads
) -> jax.Array:
    """Convolve dy, spread out by the stride, with the mirrored kernel: the gradient [N, H, W, Ci]."""
    mirrored = kernel[::-1, ::-1].swapaxes(2, 3)
    margins = []
    for axis, (stride, (before, _)) in enumerate(zip(strides, pads, strict=True)):
        size, window = shape[1 + axis], kernel.shape[axis]
        spread = (dy.shape[1 + axis] - 1) * stride + 1
        margins.append((window - 1 - before, size + before - spread))
    if strides == (1, 1):
        return _convolve(dy, mirrored, strides, (margins[0], margins[1]))
    return jax.lax.conv_general_dilated(dy, mirrored, (1, 1), margins, lhs_dilation=strides, dimension_numbers=_LAYOUT)


def _filter_gradient(
    x: jax.Array, dy: jax.Array, shape: tuple[int, ...], strides: Strides, pads: Pads, parts: int
) -> jax.Array:
    """Sum x times dy over all pixels for every tap of the kernel: the gradient [h, w, Ci, Co], summed in float32.

    One matrix product has all taps: of w copies of x, each shifted along the width, with h copies of dy, each
    shifted along the height. It goes over a few images at a time, so that the copies stay in the cache.
    """
    height, width, c, filters = shape
    images = len(x) // parts
    x = x.reshape(parts, images, *x.shape[1:])  # the leading dimension is what lies on different devices
    dy = dy.reshape(parts, images, *dy.shape[1:])
    unit = strides == (1, 1)
    columns = (width * c, height * filters) if unit else (height * width * c, filters)
    at_once = _images_at_once(images, dy.shape[2] * dy.shape[3] * sum(columns) * x.dtype.itemsize)

    def add_images(number: jax.Array, total: jax.Array) -> jax.Array:
        some_x, some_dy = (jax.lax.dynamic_slice_in_dim(a, number * at_once, at_once, 1) for a in (x, dy))
        some_x = jnp.pad(some_x, ((0, 0), (0, 0), (0, 0) if unit else pads[0], pads[1], (0, 0)))
        if unit:
            some_x, some_dy = _shift_both(some_x, some_dy, height, width, pads[0][0])
        else:
            some_x = _taps(some_x, (height, width), strides, (dy.shape[2], dy.shape[3]))
        rows_x, rows_dy = (a.reshape(parts, -1, a.shape[-1]) for a in (some_x, some_dy))
        return total + jnp.einsum("pnx,pny->pxy", rows_x, rows_dy, preferred_element_type=total.dtype)

    zero = jnp.zeros((parts, *columns), jnp.promote_types(x.dtype, jnp.float32))
    total = jax.lax.fori_loop(0, images // at_once, add_images, zero).sum(0)
    if unit:
        return total.reshape(width, c, height, filters).transpose(2, 0, 1, 3)
    return total.reshape(height, width, c, filters)


def _images_at_once(images: int, bytes_per_image: int) -> int:
    """Return the largest divisor of `images` for which the copies fit into the cache, or 1."""
    most = max(1, _CACHE_BYTES // bytes_per_image)
    return max(divisor for divisor in range(1, min(images, most) + 1) if images % divisor == 0)


def _shift_both(x: jax.Array, dy: jax.Array, height: int, width: int, top: int) -> tuple[jax.Array, jax.Array]:
    """Line up x [..., H, W', Ci] and dy [..., H', W, Co]: rows are those of x, columns those of dy."""
    rows, columns = x.shape[2], dy.shape[3]
    shifted_x = [jax.lax.slice_in_dim(x, tap, tap + columns, axis=3) for tap in range(width)]
    dy = jnp.pad(dy, ((0, 0), (0, 0), (height - 1 - top, rows + top - dy.shape[2]), (0, 0), (0, 0)))
    starts = [height - 1 - tap for tap in range(height)]
    shifted_dy = [jax.lax.slice_in_dim(dy, start, start + rows, axis=2) for start in starts]
    return jnp.concatenate(shifted_x, -1), jnp.concatenate(shifted_dy, -1)


def _taps(x: jax.Array, window: tuple[int, int], strides: Strides, out: tuple[int, int]) -> jax.Array:
    """Gather what each tap of the window sees of a padded x [..., H, W, Ci]: [..., h', w', h * w * Ci]."""
    ends = [(size - 1) * stride + 1 for size, stride in zip(out, strides, strict=True)]
    taps = [
        x[:, :, row : row + ends[0] : strides[0], column : column + ends[1] : strides[1]]
        for row in range(window[0])
        for column in range(window[1])
    ]
    return jnp.concatenate(taps, -1)
