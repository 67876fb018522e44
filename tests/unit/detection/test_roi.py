"""RoI pooling against Caffe's loop, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.detection.roi import bin_edges, roi_pool


def caffe_loop(feature_map, rois, size):
    """roi_pooling_layer.cpp of Fast R-CNN, with its float32 arithmetic: maxima, and the cells they are from."""
    height, width, channels = feature_map.shape
    pooled = np.zeros((len(rois), size, size, channels), np.float32)
    cells = np.full(pooled.shape, -1)
    scale = np.float32(1 / 16)
    for r, roi in enumerate(rois):
        x1, y1, x2, y2 = (int(np.floor(np.float32(v) * scale + np.float32(0.5))) for v in roi)
        bin_h = np.float32(max(y2 - y1 + 1, 1)) / np.float32(size)
        bin_w = np.float32(max(x2 - x1 + 1, 1)) / np.float32(size)
        for i in range(size):
            top = min(max(int(np.floor(np.float32(i) * bin_h)) + y1, 0), height)
            bottom = min(max(int(np.ceil(np.float32(i + 1) * bin_h)) + y1, 0), height)
            for j in range(size):
                left = min(max(int(np.floor(np.float32(j) * bin_w)) + x1, 0), width)
                right = min(max(int(np.ceil(np.float32(j + 1) * bin_w)) + x1, 0), width)
                if bottom <= top or right <= left:
                    continue
                window = feature_map[top:bottom, left:right].reshape(-1, channels)
                best = window.argmax(0)
                pooled[r, i, j] = window.max(0)
                cells[r, i, j] = (top + best // (right - left)) * width + left + best % (right - left)
    return pooled, cells


def some_rois(height, width, seed=0):
    """Random regions of an image, and special ones: a point, all of it, along the borders, beyond the last cell."""
    rng = np.random.default_rng(seed)
    h, w = 16 * height, 16 * width
    corners = rng.uniform(0, 1, (30, 2, 2)) * [w - 1, h - 1]
    random = np.concatenate([corners.min(1), corners.max(1)], 1)
    special = [[40, 40, 40, 40], [0, 0, w - 1, h - 1], [0, 0, 7, 7], [w - 2, h - 2, w - 1, h - 1], [8, 8, 24, 24]]
    return np.concatenate([random, special]).astype(np.float32)


@pytest.mark.parametrize("size", [7, 14])
@pytest.mark.parametrize("shape", [(38, 63), (19, 25), (4, 5), (63, 58)])
def test_values_and_gradients_are_those_of_the_loop(size, shape):
    rng = np.random.default_rng(1)
    feature_map = rng.normal(size=(*shape, 3)).astype(np.float32)
    rois = some_rois(*shape)
    weights = rng.normal(size=(len(rois), size, size, 3)).astype(np.float32)
    pooled, cells = caffe_loop(feature_map, rois, size)

    def weighted(feature_map):
        found = roi_pool(feature_map, rois, 1 / 16, size)
        return (found * weights).sum(), found

    (_, found), gradient = jax.jit(jax.value_and_grad(weighted, has_aux=True))(feature_map)
    np.testing.assert_array_equal(found, pooled)
    expected = np.zeros((shape[0] * shape[1], 3))
    for channel in range(3):
        there = cells[..., channel] >= 0
        np.add.at(expected[:, channel], cells[..., channel][there], weights[..., channel][there])
    np.testing.assert_allclose(gradient.reshape(-1, 3), expected, atol=2e-4)  # sums of many, in another order


@pytest.mark.parametrize("size", [7, 14])
def test_bins_have_the_edges_of_float32(size):
    """Spans of 57 and 62 cells and the like, where whole numbers would give other edges."""
    edges = bin_edges(128, size)
    i = np.arange(size)
    whole = np.stack([[i * n // size, -(-(i + 1) * n // size)] for n in range(129)])
    differing = np.flatnonzero((edges != whole).any((1, 2)))
    assert {57, 62, 114} & set(differing)
    for n in differing:
        length = np.float32(n) / np.float32(size)
        expected = [
            [int(np.floor(np.float32(k) * length)) for k in i],
            [int(np.ceil(np.float32(k + 1) * length)) for k in i],
        ]
        np.testing.assert_array_equal(edges[n], expected)


def test_of_equal_maxima_one_takes_the_gradient():
    gradient = jax.grad(lambda x: roi_pool(x, jnp.float32([[0, 0, 63, 63]]), 1 / 16, 1).sum())(jnp.ones((4, 4, 1)))
    assert sorted(np.asarray(gradient).ravel()) == [0] * 15 + [1]


def test_bfloat16_is_pooled_exactly():
    feature_map = jax.random.normal(jax.random.key(0), (19, 25, 4)).astype(jnp.bfloat16)
    rois = some_rois(19, 25)
    found = roi_pool(feature_map, rois, 1 / 16, 7)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, roi_pool(feature_map.astype(jnp.float32), rois, 1 / 16, 7))
