"""What a run records and prints."""

import json

import numpy as np
import pytest

from resnet_jax.metrics import Metrics
from resnet_jax.run.logs import RunLog
from resnet_jax.run.records import read_records

OF_CLASSES = Metrics(*np.array([[20.0, 60.0], [10, 20], [2, 3], [40, 60]], np.float32))  # sums by class
SUMMED = Metrics(*np.array([80.0, 30, 5, 100], np.float32))


def run_log(workdir, *, top5, skipped=None, step=0):
    with RunLog(workdir, step=step, steps=1000, top5=top5) as log:
        log.train(step + 5, SUMMED, learning_rate=0.1, gradient_norm=2.0, rate=1234.56, skipped=skipped)
        log.evaluations(step + 10, {"test": OF_CLASSES})
    return [{k: v for k, v in record.items() if k != "time"} for record in read_records(workdir)]


def test_with_many_classes_the_top5_error_is_recorded_and_printed(tmp_path, capsys):
    assert run_log(tmp_path, top5=True) == [
        {"kind": "train", "step": 5, "loss": pytest.approx(0.8), "error": 30.0, "top5_error": 5.0, "images": 100,
         "learning_rate": 0.1, "gradient_norm": 2.0, "images_per_second": 1234.6},
        {"kind": "test", "step": 10, "loss": pytest.approx(0.8), "error": 30.0, "top5_error": 5.0, "images": 100},
    ]  # fmt: skip
    assert capsys.readouterr().out.splitlines() == [
        "step    5  rate 0.1  loss 0.8000  error 30.00 %  top-5 5.00 %  1,235 images/s",
        "step   10  test error 30.00 %  top-5 5.00 %  loss 0.8000  (100 images)",
    ]
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"test/top5_error" in events


def test_with_few_classes_it_is_not(tmp_path, capsys):
    records = run_log(tmp_path, top5=False)
    assert not any("top5_error" in record for record in records)
    assert "top-5" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("skipped", "ending"), [(None, "images/s"), (0, "images/s"), (2, "  2 unreadable images skipped")]
)
def test_skipped_images_are_recorded_where_images_are_read_and_printed_where_there_are_any(
    tmp_path, capsys, skipped, ending
):
    train, test = run_log(tmp_path, top5=False, skipped=skipped)
    assert train.get("skipped") == skipped
    assert ("skipped" in train) == (skipped is not None)
    assert "skipped" not in test
    assert capsys.readouterr().out.splitlines()[0].endswith(ending)


def test_records_after_the_step_that_a_run_goes_on_from_are_dropped(tmp_path):
    run_log(tmp_path, top5=False)
    records = run_log(tmp_path, top5=False, step=5)
    assert [(record["kind"], record["step"]) for record in records] == [("train", 5), ("train", 10), ("test", 15)]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
