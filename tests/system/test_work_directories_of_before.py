"""A work directory of version 0.1 is evaluated, loaded and trained on by this one.

It was made by `python train.py configs/digits_resnet20.py --model.depth 8 --model.bn-group-size 8 --data.batch-size 16
--run.steps 4 --run.save-every 4 --run.eval-every 2 --run.log-every 2 --run.keep 1`.
"""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from paths import TESTS

import resnet_jax
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


def test_it_goes_on_as_an_undisturbed_run(workdir, tmp_path):
    config = load_config(workdir)

    def run_to(steps, folder):
        run = dataclasses.replace(config.run, workdir=str(folder), steps=steps)
        return train(dataclasses.replace(config, run=run))

    resumed, undisturbed = run_to(8, workdir), run_to(8, tmp_path / "undisturbed")
    assert [record["step"] for record in read_records(workdir) if record["kind"] == "test"] == [2, 4, 6, 8]
    # Not to the bit: its first steps were made on another machine.
    assert resumed.mean_loss == pytest.approx(undisturbed.mean_loss, rel=1e-2)
    _, resumed_variables, _ = resnet_jax.load(workdir)
    _, variables, _ = resnet_jax.load(tmp_path / "undisturbed")
    _, begun, _ = resnet_jax.load(BEFORE)
    for ours, theirs, before in zip(*map(jax.tree.leaves, (resumed_variables, variables, begun)), strict=True):
        moved = np.linalg.norm(theirs - before)
        assert np.linalg.norm(ours - theirs) < 0.05 * moved
