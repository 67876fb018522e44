"""A run killed with SIGKILL at random moments ends with the bits of an undisturbed one."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from resnet_jax.checkpoint import Checkpoints
from resnet_jax.experiment import Experiment
from resnet_jax.workdir import load_config, load_inputs

ROOT = Path(__file__).parents[1]
STEPS = 40


def start(workdir: Path) -> subprocess.Popen:
    overrides = (
        f"--run.workdir {workdir} --run.steps {STEPS} --run.log-every 1 --run.save-every 4 --run.eval-every {STEPS}"
        " --model.depth 8 --model.bn-group-size 8 --data.batch-size 8"
    )
    command = [sys.executable, "train.py", "configs/digits_resnet20.py", *overrides.split()]
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0"}  # each process compiles for itself
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def steps_done(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


def saved_leaves(workdir: Path) -> list[np.ndarray]:
    """Parameters, statistics, optimizer state and step of the last checkpoint."""
    experiment = Experiment(load_config(workdir), load_inputs(workdir))
    checkpoints = Checkpoints(workdir, read_only=True)
    return jax.tree.leaves(checkpoints.restore(experiment.abstract_state(), STEPS))


def test_killed_and_resumed_runs_end_bit_identical(tmp_path):
    undisturbed = start(tmp_path / "undisturbed")
    output, _ = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, output

    killed = tmp_path / "killed"
    chance = random.Random(time.time_ns())
    # The second is late enough for a complete checkpoint: each save waits for the one before.
    moments = [chance.randrange(3, 20), chance.randrange(20, STEPS - 4)]
    print("killed when so many steps were logged:", moments)
    for moment in moments:
        run = start(killed)
        while run.poll() is None and steps_done(killed) < moment:
            time.sleep(0.002)
        time.sleep(random.random() * 0.05)  # anywhere inside a step, or while a checkpoint is written
        run.send_signal(signal.SIGKILL)
        output, _ = run.communicate(timeout=60)
        assert run.returncode == -signal.SIGKILL, output
        assert steps_done(killed) < STEPS
    run = start(killed)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert "going on after step" in output

    for a, b in zip(saved_leaves(tmp_path / "undisturbed"), saved_leaves(killed), strict=True):
        np.testing.assert_array_equal(a, b)
