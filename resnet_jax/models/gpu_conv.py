"""Convolutions for GPUs, which multiply many channels at once; the networks take this as conv_general_dilated.

The numbers are the same up to rounding. docs/performance.md says what is known of the gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

_FEW = 4  # channels up to which pixels are packed
_ALIGNED = 16  # bytes that a tensor-core kernel loads at once: a pixel should be a multiple

Pads = tuple[int, int]  # before, after


def conv_general_dilated(
    lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int], padding: Sequence[Pads], **options: Any
) -> jax.Array:
    """Convolve; arguments and result are those of jax.lax.conv_general_dilated, of NHWC images.

    The first convolution of an ImageNet network, 7x7 with stride 2 on images [N, H, W, 3], becomes one of 4x4 with
    stride 1 on [N, H/2, W/2, 12], whose pixels are 2x2 of the image: the same products and some with zeros. So does
    any other with stride 2 on few channels. The rest stays as it is.
    """
    dilations = {*(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ())}
    if tuple(window_strides) == (2, 2) and lhs.shape[-1] == rhs.shape[-2] <= _FEW and dilations <= {1}:
        pads = list(map(_pads, lhs.shape[1:3], rhs.shape[:2], padding))
        lhs, rhs = _pack(lhs, [image for image, _ in pads]), _pack(rhs[None], [kernel for _, kernel in pads])[0]
        window_strides, padding = (1, 1), ((0, 0), (0, 0))
    return jax.lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)


def _pads(length: int, size: int, padding: Pads) -> tuple[Pads, Pads]:
    """Return the padding of image and kernel, along one axis, after which pairs of taps are on pairs of pixels.

    Tap k of output i is on pixel 2 i + k of the padded image, so a kernel of odd size gets a zero at its end.
    """
    before, after = padding
    outputs = (length + before + after - size) // 2 + 1
    taps = size + size % 2
    return (before, 2 * (outputs - 1) + taps - before - length), (0, taps - size)


def _pack(x: jax.Array, pads: Sequence[Pads]) -> jax.Array:
    """Pad x [N, H, W, C, ...] along H and W and make pixels of 2x2, aligned with zeros: [N, H/2, W/2, 4 C..., ...]."""

    def pad(x: jax.Array, *pads: Pads) -> jax.Array:
        rest = x.ndim - 1 - len(pads)
        return jax.lax.pad(x, jnp.zeros((), x.dtype), [(*pad, 0) for pad in ((0, 0), *pads, *[(0, 0)] * rest)])

    x = pad(x, *pads)
    n, height, width, channels, *rest = x.shape
    x = x.reshape(n, height // 2, 2, width // 2, 2, channels, *rest).swapaxes(2, 3)
    x = x.reshape(n, height // 2, width // 2, 4 * channels, *rest)
    return pad(x, (0, 0), (0, 0), (0, -4 * channels * x.dtype.itemsize % _ALIGNED // x.dtype.itemsize))
