"""A run whose blocks are compiled as a loop goes on without, and back."""

import dataclasses

import numpy as np
import pytest
from tiny_runs import make_config, saved_state, tiny_dataset

import resnet_jax
from resnet_jax.training import train


@pytest.fixture(autouse=True, scope="module")
def dataset():
    with tiny_dataset():
        yield


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
        model, variables, trained = resnet_jax.load(tmp_path / "run", scan_blocks=scan_blocks)
        assert model.scan_blocks == scan_blocks
        logits.append(model.apply(variables, resnet_jax.preprocess(images, trained), train=False))
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-6)

    tuned = config(True, 1)
    tuned = dataclasses.replace(
        tuned, run=make_config(tmp_path / "tuned", steps=1, init_from=str(tmp_path / "run")).run
    )
    assert train(tuned).mean_loss == pytest.approx(metrics.mean_loss, rel=0.5)  # it began where the other ended
