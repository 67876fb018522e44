"""Runs that take longer go on: with blocks compiled as a loop and without, within a warm-up or a plateau."""

import dataclasses
import os
import signal

import numpy as np
import pytest
from tiny_runs import assert_same_bits, make_config, saved_state, tiny_dataset

import resnet_jax
from resnet_jax.errors import Interrupted
from resnet_jax.run.logs import RunLog
from resnet_jax.run.records import read_records
from resnet_jax.run.saved import saved_steps
from resnet_jax.training import train


@pytest.fixture(autouse=True, scope="module")
def dataset():
    with tiny_dataset():
        yield


@pytest.mark.slow
def test_a_run_goes_on_with_its_blocks_in_a_loop_and_back(tmp_path):
    def config(scan_blocks, steps):
        run = make_config(tmp_path / "run", steps=steps)
        return dataclasses.replace(run, model=dataclasses.replace(run.model, depth=14, scan_blocks=scan_blocks))

    for steps, scan_blocks in ((4, True), (6, False), (8, True)):
        metrics = train(config(scan_blocks, steps))
    whole = make_config(tmp_path / "whole", steps=8).run
    undisturbed = train(dataclasses.replace(config(False, 8), run=whole))
    assert metrics.mean_loss == pytest.approx(undisturbed.mean_loss, rel=1e-2)
    by_block = saved_state(tmp_path / "run", config(False, 8))
    assert {"stage1_block1", "stage1_block2"} < set(by_block.params)

    images = np.zeros((2, 8, 8, 3), np.uint8)
    logits = []
    for scan_blocks in (False, True):
        model, variables, origin = resnet_jax.load(tmp_path / "run", scan_blocks=scan_blocks)
        assert model.scan_blocks == scan_blocks
        logits.append(model.apply(variables, resnet_jax.preprocess(images, origin), train=False))
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-6)

    tuned = config(True, 1)
    tuned = dataclasses.replace(
        tuned, run=make_config(tmp_path / "tuned", steps=1, init_from=str(tmp_path / "run")).run
    )
    assert train(tuned).mean_loss == pytest.approx(metrics.mean_loss, rel=0.5)  # it began where the other ended


@pytest.mark.slow
def test_the_measured_warm_up_is_part_of_the_state(tmp_path):
    optim = {"warmup": "error", "warmup_error": 60.0, "warmup_learning_rate": 0.01, "boundaries": ()}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    steps = {"steps": 50, "log_every": 1, "eval_every": 50, "save_every": 25}
    config = make_config(whole, optim=optim, **steps)
    train(config)
    rates = [r["learning_rate"] for r in read_records(whole) if r["kind"] == "train"]
    assert rates[:30] == pytest.approx([0.01] * 30)
    assert rates[-1] == pytest.approx(0.05)
    train(make_config(parts, optim=optim, **{**steps, "steps": 25}))
    train(make_config(parts, optim=optim, **steps))
    assert_same_bits(saved_state(whole, config), saved_state(parts, config))


@pytest.mark.slow
def test_what_a_plateau_learns_in_a_missed_evaluation_is_not_lost(tmp_path, monkeypatch):
    """A signal in the evaluation after step 6; the run goes on, is killed before its next checkpoint, and goes on."""

    def config(workdir, **run):
        made = make_config(workdir, optim={"schedule": "plateau", "plateau_patience": 1}, save_every=6, **run)
        return dataclasses.replace(made, data=dataclasses.replace(made.data, validation_size=30))

    undisturbed, run = config(tmp_path / "undisturbed"), config(tmp_path / "run", steps_per_dispatch=1)
    write = RunLog.train

    def stop_at_6_and_die_at_10(self, step, *args):
        write(self, step, *args)
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == 10:
            raise KeyboardInterrupt

    train(undisturbed)
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "train", stop_at_6_and_die_at_10)
        with pytest.raises(Interrupted, match="after step 6"):
            train(run)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    assert saved_steps(tmp_path / "run") == [6]
    train(run)
    assert_same_bits(saved_state(tmp_path / "run", run), saved_state(tmp_path / "undisturbed", undisturbed))
