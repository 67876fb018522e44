"""Average precision by the rules of the development kit, on examples that can be counted by hand."""

import numpy as np
import pytest

from resnet_jax.detection.voc_metric import Curve, average_precision, precision_recall

BOX = np.float32([10, 10, 29, 29])  # 20x20
HALF = np.float32([10, 10, 29, 19])  # IoU exactly 0.5 with it


def curve_of(detections, objects, difficult=None):
    """Match (image, score, box) with the objects of each image."""
    images, scores, boxes = zip(*detections, strict=True)
    difficult = difficult or [np.zeros(len(of_image), bool) for of_image in objects]
    return precision_recall(np.array(images), np.array(scores), np.array(boxes), objects, difficult)


def test_an_object_is_found_once():
    curve = curve_of([(0, 0.9, BOX), (0, 0.8, BOX)], [BOX[None]])
    np.testing.assert_array_equal(curve.precision, [1, 0.5])
    np.testing.assert_array_equal(curve.recall, [1, 1])


def test_an_overlap_of_exactly_a_half_does_not_count():
    assert curve_of([(0, 0.9, HALF)], [BOX[None]]).recall[0] == 0
    assert curve_of([(0, 0.9, HALF + np.float32([0, 0, 0, 1]))], [BOX[None]]).recall[0] == 1


def test_difficult_objects_count_neither_way():
    objects = [np.stack([BOX, BOX + 100])]
    curve = curve_of([(0, 0.9, BOX + 100), (0, 0.8, BOX + 100), (0, 0.7, BOX)], objects, [np.array([False, True])])
    assert curve.objects == 1
    np.testing.assert_array_equal(curve.recall, [0, 0, 1])
    assert curve.precision[-1] == 1


def test_a_detection_goes_to_the_object_that_it_overlaps_most():
    """Which was found before: the other one, though near enough, is not taken instead."""
    near = BOX + np.float32([4, 0, 4, 0])
    curve = curve_of([(0, 0.9, BOX), (0, 0.8, BOX + np.float32([1, 0, 1, 0]))], [np.stack([BOX, near])])
    np.testing.assert_array_equal(curve.recall, [0.5, 0.5])


def test_the_better_score_comes_first_and_images_are_kept_apart():
    curve = curve_of([(0, 0.2, BOX), (1, 0.9, BOX)], [BOX[None], np.zeros((0, 4), np.float32)])
    np.testing.assert_array_equal(curve.precision, [0, 0.5])


def test_both_ways_of_averaging():
    """Right, wrong, right, of 4 objects: precision 1, 1/2, 2/3 at recall 1/4, 1/4, 1/2."""
    curve = Curve(np.array([0.25, 0.25, 0.5]), np.array([1, 0.5, 2 / 3]), 4)
    assert average_precision(curve, eleven_point=False) == pytest.approx(0.25 * 1 + 0.25 * 2 / 3)
    assert average_precision(curve, eleven_point=True) == pytest.approx((3 * 1 + 3 * 2 / 3) / 11)


def test_a_recall_of_three_tenths_does_not_reach_the_fourth_point():
    """0.1 * 3 is 0.30000000000000004, as in the published program."""
    curve = Curve(np.array([0.3]), np.array([1.0]), 10)
    assert average_precision(curve, eleven_point=True) == pytest.approx(3 / 11)


def test_a_class_without_objects_has_no_average():
    assert np.isnan(average_precision(Curve(np.zeros(0), np.zeros(0), 0), eleven_point=True))
    nothing = [np.zeros((0, 4), np.float32)]
    curve = precision_recall(np.zeros(0, int), np.zeros(0), np.zeros((0, 4)), [BOX[None]], [np.zeros(1, bool)])
    assert average_precision(curve, eleven_point=False) == 0
    assert np.isnan(average_precision(curve_of([(0, 0.5, BOX)], nothing), eleven_point=False))
