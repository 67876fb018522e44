"""What a run records and prints."""

import json
import sys

import numpy as np
import pytest

from resnet_jax.metrics import Metrics
from resnet_jax.run.logs import Log, RunLog
from resnet_jax.run.records import read_records

# Sums by class.
EVALUATED = Metrics(
    np.array([20.0, 60]), {"error": np.array([10, 20]), "top5_error": np.array([2, 3])}, np.array([40, 60])
)
NUMBERS = {"learning_rate": 0.1, "gradient_norm": 2.0, "images_per_second": 1234.6}
RECORDED = {"loss": pytest.approx(0.8), "error": 30.0, "images": 100}


def run_log(workdir, *, num_classes=10, skipped=None, step=0, **options):
    with RunLog(workdir, step=step, steps=1000, num_classes=num_classes, **options) as log:
        log.start(step)
        log.train(step + 5, EVALUATED, NUMBERS if skipped is None else {**NUMBERS, "skipped": skipped})
        log.evaluations(step + 10, {"test": EVALUATED})
        log.draw_curves()
    records = [record for record in read_records(workdir) if record["kind"] != "start"]
    return [{k: v for k, v in record.items() if k != "time"} for record in records]


@pytest.mark.parametrize(("num_classes", "top5"), [(10, False), (100, True)])
def test_records_and_lines(tmp_path, capsys, num_classes, top5):
    errors, printed = ({"top5_error": 5.0}, "  top-5 5.00 %") if top5 else ({}, "")  # of few classes it says little
    assert run_log(tmp_path, num_classes=num_classes) == [
        {"kind": "train", "step": 5, **RECORDED, **errors, **NUMBERS},
        {"kind": "test", "step": 10, **RECORDED, **errors},
    ]
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"step    5  lr 0.1  loss 0.8000  error 30.00 %{printed}  1,235 images/s",
        f"step   10  test error 30.00 %{printed}  loss 0.8000  (100 images)",
    ]
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"test/error" in events
    assert (b"test/top5_error" in events) == top5
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("skipped", "ending"), [(None, "images/s"), (0, "images/s"), (2, "  2 unreadable images skipped")]
)
def test_skipped_images_are_recorded_where_images_are_read_and_printed_where_there_are_any(
    tmp_path, capsys, skipped, ending
):
    train, test = run_log(tmp_path, skipped=skipped)
    assert train.get("skipped") == skipped
    assert ("skipped" in train) == (skipped is not None)
    assert "skipped" not in test
    assert capsys.readouterr().out.splitlines()[1].endswith(ending)


def test_records_after_the_step_that_a_run_goes_on_from_are_dropped(tmp_path):
    run_log(tmp_path)
    records = run_log(tmp_path, step=5)
    assert [(record["kind"], record["step"]) for record in records] == [("train", 5), ("train", 10), ("test", 15)]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_an_evaluation_that_will_be_made_again_is_dropped(tmp_path):
    run_log(tmp_path)
    with RunLog(tmp_path, step=10, steps=1000, evaluated=False):
        assert [record["kind"] for record in read_records(tmp_path)] == ["start", "train"]


def test_without_the_extra_plots_a_run_says_so_and_goes_on(tmp_path, capsys, monkeypatch):
    for package in ("matplotlib", "tensorboardX"):
        monkeypatch.setitem(sys.modules, package, None)
    assert len(run_log(tmp_path)) == 2
    assert [line for line in capsys.readouterr().out.splitlines() if "going on" in line] == [
        f"going on without {name}: this needs {package}, of the extra [plots]: pip install {package}"
        for name, package in (("curves.png", "matplotlib"), ("TensorBoard's events", "tensorboardX"))
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}


def test_other_processes_write_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Log() as log:
        log.start(0)
        log.train(5, EVALUATED, NUMBERS)
        log.evaluations(10, {"test": EVALUATED})
        log.draw_curves()
        log.say("progress")
        log.warn("an image")
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "process 0: an image\n")
