"""Boxes and anchors against the numbers of py-faster-rcnn."""

import numpy as np
import pytest

from resnet_jax.detection.anchors import base_anchors, grid_anchors
from resnet_jax.detection.boxes import clip, decode, encode, iou

# The list in the comment of generate_anchors.py, which counts from 1.
PUBLISHED = np.array(
    [
        [-83, -39, 100, 56],
        [-175, -87, 192, 104],
        [-359, -183, 376, 200],
        [-55, -55, 72, 72],
        [-119, -119, 136, 136],
        [-247, -247, 264, 264],
        [-35, -79, 52, 96],
        [-79, -167, 96, 184],
        [-167, -343, 184, 360],
    ]
)


def test_anchors_are_the_published_ones():
    np.testing.assert_array_equal(base_anchors((0.5, 1, 2), (8, 16, 32)), PUBLISHED - 1)


def test_positions_go_row_by_row_and_anchors_of_a_position_together():
    base = base_anchors((0.5, 1, 2), (8, 16, 32))
    anchors = grid_anchors(3, 4, 16, base)
    assert anchors.shape == (3 * 4 * 9, 4)
    np.testing.assert_array_equal(anchors[9 * (1 * 4 + 2) + 5], base[5] + [32, 16, 32, 16])


def test_overlap_counts_the_last_pixel():
    a = np.array([[0, 0, 9, 9]], np.float32)
    b = np.array([[5, 0, 14, 9], [0, 0, 9, 9], [10, 10, 12, 12], [9, 9, 9, 9]], np.float32)
    np.testing.assert_allclose(iou(a, b)[0], [50 / 150, 1, 0, 1 / 100], rtol=1e-6)
    np.testing.assert_allclose(iou(a, b, one=0.0)[0], [36 / 126, 1, 0, 0], rtol=1e-6)


@pytest.mark.parametrize(("one", "more"), [(1.0, 1), (0.0, 0)])
def test_decoding_what_was_encoded_is_a_pixel_too_far_as_in_2015(one, more):
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 300, (2, 50, 2)).astype(np.float32)
    sides = rng.uniform(8, 200, (2, 50, 2)).astype(np.float32)
    boxes, targets = np.concatenate([corners, corners + sides], -1)
    found = decode(boxes, encode(boxes, targets, one), one)
    np.testing.assert_allclose(found, targets + np.float32([0, 0, more, more]), atol=2e-4)


def test_encoding_is_that_of_the_paper():
    """tx = (x - xa) / wa, tw = log(w / wa), by hand: a box of 10x20 pixels, a target of 20x10 that begins at (5, 5)."""
    box, target = np.array([0, 0, 9, 19], np.float32), np.array([5, 5, 24, 14], np.float32)
    np.testing.assert_allclose(encode(box, target), [1.0, 0.0, np.log(2), np.log(0.5)], atol=1e-6)


def test_a_huge_delta_stays_finite():
    assert np.isfinite(decode(np.float32([0, 0, 15, 15]), np.float32([0, 0, 1e4, 1e4]))).all()


def test_clipping_keeps_the_last_pixel_inside():
    boxes = np.array([[-5, -7, 200, 300]], np.float32)
    np.testing.assert_array_equal(clip(boxes, np.array([100, 150])), [[0, 0, 149, 99]])
