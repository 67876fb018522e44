"""Suppression against a loop over boxes."""

import jax
import numpy as np
import pytest

from resnet_jax.detection.nms import first_kept, suppress


def greedy(boxes, alive, threshold):
    """Keep a box unless a better one that is kept overlaps it: as published, one box after the other."""
    kept = np.zeros(len(boxes), bool)
    areas = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    for i in range(len(boxes)):
        if not alive[i]:
            continue
        kept[i] = True
        for j in np.flatnonzero(kept[:i]):
            width = min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0]) + np.float32(1)
            height = min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1]) + np.float32(1)
            both = max(width, np.float32(0)) * max(height, np.float32(0))
            if both / (areas[i] + areas[j] - both) > np.float32(threshold):
                kept[i] = False
                break
    return kept


def random_boxes(n, seed, area=200):
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, area, (n, 2))
    return np.concatenate([corners, corners + rng.integers(4, 80, (n, 2))], 1).astype(np.float32)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("n", [1, 40, 256, 600])
def test_keeps_what_a_loop_keeps(n, threshold):
    boxes, alive = random_boxes(n, n), np.random.default_rng(n).random(n) > 0.1
    expected = greedy(boxes, alive, threshold)
    np.testing.assert_array_equal(jax.jit(suppress, static_argnums=2)(boxes, alive, threshold), expected)
    for most in (20, n):
        index, ok = jax.jit(first_kept, static_argnums=(2, 3))(boxes, alive, threshold, most)
        np.testing.assert_array_equal(index[ok], np.flatnonzero(expected)[:most])


def test_equal_boxes_leave_the_first():
    boxes = np.tile(np.float32([0, 0, 9, 9]), (5, 1))
    np.testing.assert_array_equal(suppress(boxes, np.array([False, True, True, True, True]), 0.5), [0, 1, 0, 0, 0])


def test_a_chain_takes_as_many_passes_as_it_is_long():
    """Each box suppresses the next only: every other one stays, the last of them decided after 300 passes."""
    x = np.arange(300, dtype=np.float32) * 4
    boxes = np.stack([x, 0 * x, x + 9, 0 * x + 9], 1)
    np.testing.assert_array_equal(suppress(boxes, np.ones(300, bool), 0.4), np.arange(300) % 2 == 0)
    index, _ = first_kept(boxes, np.ones(300, bool), 0.4, 150)
    np.testing.assert_array_equal(index, np.arange(0, 300, 2))


def test_an_iou_of_the_threshold_does_not_suppress():
    boxes = np.float32([[0, 0, 9, 9], [0, 0, 9, 4]])  # half of the first
    assert suppress(boxes, np.ones(2, bool), 0.5).all()


def test_without_any_box_nothing_is_kept():
    _, ok = first_kept(random_boxes(10, 0), np.zeros(10, bool), 0.5, 5)
    assert not ok.any()
