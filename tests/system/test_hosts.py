"""Two real processes on one machine train one network, are killed, and one process goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from image_folders import write_folder
from paths import ROOT

from resnet_jax.data import load_dataset
from resnet_jax.data.tools.statistics import compute_statistics, save_statistics
from resnet_jax.run.checkpoint import restore
from resnet_jax.run.saved import saved_steps
from resnet_jax.run.workdir import load_config, load_inputs
from resnet_jax.trainer import Trainer

CONFIG = """
from resnet_jax.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig

def get_config():
    return Config(
        model=ModelConfig(depth=8, bn_group_size=4),
        # Each row of a batch gets a colour of its own, so that it matters which image lies in it. 7 images do not
        # divide over 2 devices.
        data=DataConfig(name="folder", batch_size=8, eval_batch_size=7, image_size=32, shorter_side=(32, 48), workers=0,
                        lighting=1.0),
        optim=OptimConfig(learning_rate=0.05, boundaries=()),
        run=RunConfig(steps=12, log_every=1, eval_every=12, save_every=3),
    )
"""


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    write_folder(folder / "images")
    statistics = compute_statistics(load_dataset("folder", folder / "images").train, 32, workers=0)
    save_statistics(statistics, folder / "images")
    (folder / "config.py").write_text(CONFIG)
    return folder


def start(
    setup: Path, workdir: Path, *overrides: str, processes: int = 1, data_dirs: tuple[str, ...] = ("images",) * 2
) -> list[subprocess.Popen]:
    """Start the processes of a run, with two devices in all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "train.py", str(setup / "config.py"), "--run.workdir", str(workdir), *overrides]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(2 // processes)}
    started = []
    for number in range(processes):
        of_process = ["--hosts.coordinator", coordinator, "--hosts.processes", str(processes)]
        of_process += ["--hosts.process-id", str(number)]
        started.append(
            subprocess.Popen(
                [*command, "--data.dir", str(setup / data_dirs[number]), *(of_process if processes > 1 else [])],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def outputs(processes: list[subprocess.Popen]) -> list[str]:
    """Wait for the processes; none is left behind."""
    try:
        return [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def wait_until(condition: Callable[[], bool], processes: list[subprocess.Popen]) -> None:
    while not condition():
        assert all(process.poll() is None for process in processes), outputs(processes)
        time.sleep(0.01)


def steps_done(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


def last_state(workdir: Path) -> list[np.ndarray]:
    config = load_config(workdir)
    trainer = Trainer(config, load_inputs(workdir), load_dataset(config.data.name, config.data.dir))
    return jax.tree.leaves(restore(workdir, trainer.abstract_state(), 12))


@pytest.fixture(scope="module")
def undisturbed(setup):
    """A run of one process."""
    workdir = setup / "undisturbed"
    (process,) = start(setup, workdir)
    (output,) = outputs([process])
    assert process.returncode == 0, output
    return workdir


def test_two_processes_are_killed_and_one_goes_on_with_the_same_images(setup, undisturbed):
    workdir = setup / "killed"
    pair = start(setup, workdir, processes=2)
    # Saved in the background: step 6 waits for it to be complete.
    wait_until(lambda: (workdir / "checkpoints" / "3").exists() and steps_done(workdir) >= 4, pair)
    for process in pair:
        process.send_signal(signal.SIGKILL)
    outputs(pair)
    assert pair[0].returncode == -signal.SIGKILL

    (process,) = start(setup, workdir)
    (output,) = outputs([process])
    assert process.returncode == 0, output
    assert "going on after step" in output
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [record["devices"] for record in records if record["kind"] == "start"] == [2, 2]
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, 13))
    # Other images, another order or other BN groups would lead far away.
    for found, expected in zip(last_state(workdir), last_state(undisturbed), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_if_one_process_dies_in_a_step_the_other_ends_too(setup):
    pair = start(setup, setup / "left", "--run.steps", "100000", "--run.save-every", "100000", processes=2)
    wait_until(lambda: steps_done(setup / "left") >= 3, pair)
    pair[1].send_signal(signal.SIGKILL)
    printed = outputs(pair)
    assert [process.returncode for process in pair] == [128 + signal.SIGABRT, -signal.SIGKILL]
    assert "another process has ended, or cannot be reached" in printed[0]
    assert "Traceback" not in printed[0]


def test_a_signal_to_one_process_stops_both_and_the_run_is_saved(setup):
    workdir = setup / "stopped"
    pair = start(setup, workdir, "--run.steps", "100000", "--run.save-every", "100000", processes=2)
    wait_until(lambda: steps_done(workdir) >= 3, pair)
    pair[1].send_signal(signal.SIGTERM)
    printed = outputs(pair)
    assert [process.returncode for process in pair] == [128 + signal.SIGTERM] * 2, printed
    steps = saved_steps(workdir)
    assert len(steps) == 1
    assert f"stopped by SIGTERM after step {steps[0]}" in printed[0]
    assert "loss" not in printed[1]  # only the first process logs


def test_a_mistake_in_one_process_stops_both(setup):
    pair = start(setup, setup / "never", processes=2, data_dirs=("images", "nowhere"))
    printed = outputs(pair)
    assert [process.returncode for process in pair] == [2, 2], printed
    assert "nowhere" in printed[1]
    assert "error: another process cannot go on" in printed[0]
    assert not (setup / "never").exists()


def test_what_only_one_process_meets_ends_both(setup):
    """Its worker process is killed; it must not wait for the goodbye of the other, which waits for it in a step."""
    workdir = setup / "worker"
    steps = ("--run.steps", "100000", "--run.save-every", "100000")
    pair = start(setup, workdir, *steps, "--data.workers", "1", processes=2)
    wait_until(lambda: steps_done(workdir) >= 3, pair)
    for task in Path("/proc", str(pair[1].pid), "task").iterdir():
        for child in (task / "children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
    printed = outputs(pair)
    assert [process.returncode for process in pair] == [128 + signal.SIGABRT, 1], printed
    assert "error: a worker process that reads images was killed" in printed[1]
