"""The samples that the two networks are trained on: counts, ties, and images that lack something."""

import jax
import numpy as np
import pytest

from resnet_jax.detection.anchors import base_anchors, grid_anchors
from resnet_jax.detection.boxes import encode
from resnet_jax.detection.losses import region_losses, rpn_losses, smooth_l1
from resnet_jax.detection.targets import Objects, RegionSample, sample_anchors, sample_regions

SIZE = np.array([600, 800])
ANCHORS = grid_anchors(38, 50, 16, base_anchors((0.5, 1, 2), (8, 16, 32)))
anchors_of = jax.jit(sample_anchors, static_argnames=("samples",))


def objects(*boxes, rows=8):
    """Make objects of class 1, 2, ... with rows that fill up."""
    found = np.zeros((rows, 4), np.float32)
    found[: len(boxes)] = np.reshape(boxes, (-1, 4))
    return Objects(found, np.where(np.arange(rows) < len(boxes), np.arange(rows) + 1, 0).astype(np.int32))


def inside(anchors):
    return (anchors[:, 0] >= 0) & (anchors[:, 1] >= 0) & (anchors[:, 2] < 800) & (anchors[:, 3] < 600)


def overlaps(anchors, box):
    """IoU in float64, written anew."""
    low, high = np.maximum(anchors[:, :2], box[:2]), np.minimum(anchors[:, 2:], box[2:])
    both = np.maximum(high - low + 1, 0).astype(np.float64).prod(1)
    area = (anchors[:, 2:] - anchors[:, :2] + 1).astype(np.float64).prod(1)
    return both / (area + np.prod(np.subtract(box[2:], box[:2]) + 1.0) - both)


def test_anchors_are_labelled_by_the_rules_of_the_paper():
    boxes = [(100, 100, 280, 200), (400, 300, 520, 420)]
    shares = np.stack([overlaps(ANCHORS, box) for box in boxes], 1)
    shares[~inside(ANCHORS)] = -1
    positive = (shares.max(1) >= 0.7) | (shares == shares.max(0)).any(1)
    negative = inside(ANCHORS) & (shares.max(1) < 0.3) & ~positive
    for seed in range(3):
        sample = anchors_of(jax.random.key(seed), ANCHORS, objects(*boxes), SIZE)
        chosen, is_positive = np.asarray(sample.anchor), np.asarray(sample.positive)
        assert sorted(chosen[is_positive]) == sorted(np.flatnonzero(positive))  # fewer than 128: all of them
        counts = np.asarray(sample.counts)
        assert counts.sum() == 256
        assert negative[chosen[counts & ~is_positive]].all()
        assert len(set(chosen[counts])) == 256
        nearest = shares[chosen[is_positive]].argmax(1)
        expected = encode(ANCHORS[chosen[is_positive]], np.float32(boxes)[nearest])
        np.testing.assert_allclose(sample.deltas[is_positive], expected, atol=1e-6)


def test_at_most_half_of_the_anchors_are_positive():
    many = [(x, y, x + 127, y + 127) for x in range(0, 600, 16) for y in range(0, 400, 16)]
    sample = anchors_of(jax.random.key(0), ANCHORS, objects(*many, rows=len(many)), SIZE)
    assert sample.positive.sum() == 128
    assert sample.counts.sum() == 256


def test_all_anchors_that_overlap_an_object_most_are_positive():
    """Between two positions, at the same distance from both."""
    box = ANCHORS[(10 * 50 + 20) * 9 + 3] + np.float32([8, 0, 8, 0])
    sample = anchors_of(jax.random.key(0), ANCHORS, objects(box), SIZE)
    chosen = set(np.asarray(sample.anchor)[np.asarray(sample.positive)].tolist())
    assert {(10 * 50 + 20) * 9 + 3, (10 * 50 + 21) * 9 + 3} <= chosen


@pytest.mark.parametrize("box", [(), (-40.0, -40.0, -20.0, -20.0)])
def test_without_an_object_in_reach_all_anchors_are_negative(box):
    sample = anchors_of(jax.random.key(0), ANCHORS, objects(*([box] if box else [])), SIZE)
    assert not sample.positive.any()
    assert sample.counts.sum() == 256


def test_anchors_beyond_a_padded_image_take_no_part():
    sample = anchors_of(jax.random.key(0), ANCHORS, objects((50, 50, 150, 150)), np.array([300, 400]))
    taken = ANCHORS[np.asarray(sample.anchor)[np.asarray(sample.counts)]]
    assert taken[:, 2].max() < 400
    assert taken[:, 3].max() < 300


def regions(boxes, given, seed=0, **options):
    boxes = np.asarray(boxes, np.float32)
    return sample_regions(jax.random.key(seed), boxes, np.ones(len(boxes), bool), given, **options)


def around(box, n, shift, seed=0):
    """Boxes near another."""
    return np.float32(box) + np.random.default_rng(seed).uniform(-shift, shift, (n, 4)).astype(np.float32)


def test_a_quarter_of_the_regions_are_objects():
    box = (100, 100, 299, 299)
    proposals = np.concatenate([around(box, 100, 5), around((250, 250, 449, 449), 300, 20)])
    sample = regions(proposals, objects(box), background_iou=(0.0, 0.5))
    assert (sample.classes == 1).sum() == 32
    assert sample.counts.sum() == 128
    taken = np.asarray(sample.boxes)[np.asarray(sample.classes) == 1]
    assert (overlaps(taken, box) >= 0.5).all()
    background = np.asarray(sample.boxes)[np.asarray(sample.classes) == 0]
    assert (overlaps(background, box) < 0.5).all()


def test_background_must_overlap_an_object_a_little():
    box = (100, 100, 299, 299)
    far, near = around((500, 400, 599, 499), 150, 5), around((200, 200, 399, 399), 40, 5)
    sample = regions(np.concatenate([far, near]), objects(box), background_iou=(0.1, 0.5))
    counts = np.asarray(sample.counts)
    assert counts.sum() == 41  # 40 near, and the object itself
    assert (np.asarray(sample.classes)[counts] == 1).sum() == 1


def test_the_object_itself_is_a_region_with_no_delta():
    sample = regions(around((500, 400, 599, 499), 127, 5), objects((100, 100, 299, 299)), background_iou=(0.0, 0.5))
    (own,) = np.flatnonzero(sample.classes == 1)
    np.testing.assert_allclose(sample.deltas[own], 0, atol=1e-6)


def test_deltas_are_in_units_of_the_deviations():
    box, proposal = (100, 100, 199, 199), (110, 100, 209, 199)
    sample = regions([proposal] * 128, objects(box), background_iou=(0.0, 0.5))
    of_proposal = np.asarray(sample.deltas)[(np.asarray(sample.boxes) == np.float32(proposal)).all(1)]
    np.testing.assert_allclose(of_proposal[0], [-1.0, 0, 0, 0], atol=1e-5)  # 10 of 100 pixels, divided by 0.1


def test_without_objects_all_regions_are_background():
    sample = regions(around((100, 100, 299, 299), 200, 50), objects())
    assert sample.counts.all()
    assert not sample.classes.any()


def test_smooth_l1_has_one_slope_where_it_changes():
    x = np.float32([0.05, -0.1, 1 / 9, 0.5, -2])
    np.testing.assert_allclose(
        smooth_l1(x, 3.0), [4.5 * 0.0025, 4.5 * 0.01, 0.5 / 9, 0.5 - 0.5 / 9, 2 - 0.5 / 9], rtol=1e-5
    )


def test_losses_are_divided_by_what_counts():
    """By hand: uniform scores cost log 2 and log 4, wherever; one box is 2 too far to the right."""
    sample = anchors_of(jax.random.key(0), ANCHORS, objects((100, 100, 280, 200)), SIZE)
    deltas = np.zeros((len(ANCHORS), 4), np.float32)
    deltas[np.asarray(sample.anchor)] = np.asarray(sample.deltas) + np.float32([2, 0, 0, 0])
    of_class, of_box = rpn_losses(np.zeros((len(ANCHORS), 2), np.float32), deltas, sample)
    np.testing.assert_allclose(of_class, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(of_box, int(sample.positive.sum()) * (2 - 0.5 / 9) / 256, rtol=1e-4)

    counts = np.array([True, True, True, False])
    regions = RegionSample(np.zeros((4, 4)), np.array([2, 0, 0, 3]), counts, np.zeros((4, 4), np.float32))
    found = np.zeros((4, 4, 4), np.float32)
    found[0, 2, 0] = 2.0
    found[0, 1, 0] = found[1, 0, 0] = found[3, 3, 0] = 50.0  # of another class, of background, of what does not count
    of_class, of_box = region_losses(np.zeros((4, 4), np.float32), found, regions)
    np.testing.assert_allclose([of_class, of_box], [np.log(4), 1.5 / 3], rtol=1e-6)
