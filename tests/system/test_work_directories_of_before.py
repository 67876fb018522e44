"""A work directory of version 0.1 is evaluated, loaded and trained on by this one.

It was made by `python train.py configs/digits_resnet20.py --model.depth 8 --model.bn-group-size 8 --data.batch-size 16
--run.steps 4 --run.save-every 4 --run.eval-every 2 --run.log-every 2 --run.keep 1`.
"""

import dataclasses
import shutil

import pytest
from paths import TESTS

from resnet_jax.evaluate import evaluate
from resnet_jax.run.records import read_records
from resnet_jax.run.workdir import load_config
from resnet_jax.training import train

BEFORE = TESTS / "fixtures" / "workdir_0.1"


@pytest.fixture
def workdir(tmp_path):
    return shutil.copytree(BEFORE, tmp_path / "run")


def test_it_is_evaluated_as_it_was_then(workdir):
    (then,) = [record for record in read_records(workdir) if record["kind"] == "test" and record["step"] == 4]
    evaluation = evaluate([workdir])
    assert (evaluation.step, evaluation.count) == (4, then["images"])
    assert evaluation.top1_error == pytest.approx(then["error"], abs=0.5)  # one image of 360 is 0.28
    assert evaluation.loss == pytest.approx(then["loss"], rel=1e-4)


def test_it_goes_on_as_it_did_then(workdir):
    config = load_config(workdir)
    train(dataclasses.replace(config, run=dataclasses.replace(config.run, workdir=str(workdir), steps=8)))
    losses = {record["step"]: record["loss"] for record in read_records(workdir) if record["kind"] == "test"}
    assert list(losses) == [2, 4, 6, 8]
    # What version 0.1 reaches from its own checkpoint of step 4. Not an undisturbed run from step 0: at the initial
    # learning rate rounding alone sends the first steps apart, and another processor's by more than 1e-4 after four.
    assert losses[6] == pytest.approx(2.28486, rel=1e-3)
    assert losses[8] == pytest.approx(2.33268, rel=1e-3)
