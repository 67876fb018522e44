"""Weights that others published, from their file to the error that they published."""

import pytest
from paths import SHARED

from resnet_jax.cli.commands import main
from resnet_jax.evaluate import evaluate, record
from resnet_jax.paper.make import make

PUBLISHED = SHARED / "weights" / "resnet20-12fca82f.th"


def test_published_weights_make_their_published_error(tmp_path, cifar10_dir):
    pytest.importorskip("torch", reason="reading .th needs torch")
    assert main(["import", str(PUBLISHED), "--model", "resnet20", "--out", str(tmp_path / "run")]) == 0
    evaluation = evaluate([tmp_path / "run"], data_dir=str(cifar10_dir))
    assert evaluation.count == 10_000
    assert evaluation.top1_error == 8.27
    record(evaluation)
    table = make("table6", tmp_path)
    rows = [row for row in table.rows if row[:2] == ("ResNet", "20")]
    assert [row[4:8] for row in rows] == [("8.75", "8.27", "1", "imported from resnet20-12fca82f.th, not trained here")]
