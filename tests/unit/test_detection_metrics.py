"""From what is found in images to the numbers that are recorded."""

import json
from pathlib import Path

import numpy as np
import pytest

from resnet_jax.config import DetectionConfig
from resnet_jax.data.annotated import Annotation
from resnet_jax.detection_metrics import Detections, score
from resnet_jax.evaluate_detection import DetectionEvaluation

BOX = np.float32([10, 10, 29, 29])


class Images:
    """Two images: a red object, and a green one that is difficult."""

    annotations = (
        Annotation(50, 60, BOX[None], np.array([0], np.int32), np.array([False])),
        Annotation(50, 60, BOX[None] + 10, np.array([1], np.int32), np.array([True])),
    )

    def __len__(self):
        return 2

    def id(self, index):
        return f"00000{index}"


def found(*boxes):
    rows = np.array([box for box, _, _ in boxes], np.float32).reshape(-1, 4)
    scores = np.array([s for _, s, _ in boxes], np.float32)
    return Detections(rows, scores, np.array([k for _, _, k in boxes], np.int32))


FOUND = {0: found((BOX, 0.9, 0), (BOX, 0.4, 1)), 1: found((BOX + 10, 0.8, 1))}
NEAR = np.float32([[10, 10, 29, 23], [0, 0, 5, 5]])  # IoU 0.7 with it


def scored(**more):
    arguments = {"found": FOUND, "proposals": {0: NEAR, 1: NEAR[:0]}, "eleven_point": False, **more}
    return score(Images(), ("red", "green", "blue"), **arguments)


def test_the_mean_is_over_the_classes_that_have_objects():
    """The difficult one does not count, so that green has none."""
    result = scored()
    np.testing.assert_array_equal(result.average_precisions, [100, np.nan, np.nan])
    assert result.mean_average_precision == 100
    assert result.error == 0
    values = json.loads(json.dumps(result.values(3), allow_nan=False))
    assert values["average_precision"] == {"red": 100, "green": None, "blue": None}


def test_recall_is_that_of_the_proposals():
    result = scored()
    assert result.recall == 100
    assert result.average_recall == pytest.approx(100 * 5 / 10)  # IoU 0.7 reaches 0.5, 0.55, 0.6, 0.65, 0.7
    assert scored(proposals={0: NEAR[:0], 1: NEAR}).recall == 0


def test_two_objects_need_two_proposals():
    class Twins(Images):
        annotations = (Annotation(50, 60, np.stack([BOX, BOX]), np.zeros(2, np.int32), np.zeros(2, bool)),)

    result = score(Twins(), ("red",), {0: found()}, {0: np.stack([BOX, BOX + 20])}, eleven_point=True)
    assert result.recall == 50


def test_without_any_object_there_are_no_numbers():
    class Nothing(Images):
        annotations = (Annotation(50, 60, np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros(0, bool)),)

    result = score(Nothing(), ("red",), {0: found((BOX, 0.9, 0))}, {0: NEAR}, eleven_point=True)
    values = result.values(1)
    assert values["mean_average_precision"] is values["recall"] is values["average_recall"] is None


def test_result_files_count_from_1(tmp_path):
    evaluation = DetectionEvaluation(
        Path("run"), 7, DetectionConfig(), ("2007_test",), Images(), FOUND, scored(), float("nan")
    )
    names = [path.name for path in evaluation.write_results(tmp_path / "results")]
    assert names == [f"comp4_det_test_{name}.txt" for name in ("red", "green", "blue")]
    assert (tmp_path / "results" / names[0]).read_text() == "000000 0.900000 11.0 11.0 30.0 30.0\n"
    lines = (tmp_path / "results" / names[1]).read_text().splitlines()
    assert lines == ["000000 0.400000 11.0 11.0 30.0 30.0", "000001 0.800000 21.0 21.0 40.0 40.0"]
    assert (tmp_path / "results" / names[2]).read_text() == ""
    text = "\n".join(evaluation.to_lines())
    assert "mean AP@.5 100.00 %" in text
    assert "no objects" in text
