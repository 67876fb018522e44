"""Kill training with SIGKILL at random moments, start it again each time, and compare the end with an undisturbed run.

    python -m reliability.crash [--kills 50] [--processes 1] [--seed N]

A small network learns the handwritten digits. Half of the kills come while a checkpoint is being written, the others
anywhere in training or while the program starts. After each kill the newest complete checkpoint must be that of the
last save that was due, or of the one before it if that was still being written; it must be intact; and the next start
must go on from it. In the end parameters, statistics, optimizer and records have the same bits. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from resnet_jax.data.inputs import load_data
from resnet_jax.run.checkpoint import restore
from resnet_jax.run.records import read_records
from resnet_jax.run.saved import saved_steps, unfinished, verify
from resnet_jax.run.workdir import load_config, load_inputs
from resnet_jax.trainer import Trainer

ROOT = Path(__file__).parents[1]
SAVE_EVERY = 20
PATIENCE = 300.0  # seconds
MOMENTS = ("saving", "training", "saving", "starting")  # and again


class Failure(Exception):
    """What must not happen."""


class Kill(NamedTuple):
    """A kill, and what it left: whether a checkpoint was half written, the last logged and saved steps (0: none)."""

    moment: str
    half_written: bool
    logged: int
    saved: int


class Run(NamedTuple):
    """A run of so many processes, to be started again and again."""

    workdir: Path
    steps: int
    save_every: int
    processes: int

    @contextlib.contextmanager
    def started(self) -> Iterator[list[subprocess.Popen[bytes]]]:
        """Start its processes, each with its output in a file; none is left behind."""
        command = [sys.executable, "train.py", "configs/digits_resnet20.py"]
        command += f"--run.workdir {self.workdir} --run.steps {self.steps} --run.log-every 1".split()
        command += f"--run.save-every {self.save_every} --run.eval-every {5 * self.save_every}".split()
        command += ["--model.depth", "8", "--model.bn-group-size", "8", "--data.batch-size", "16"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            hosts = f"--hosts.coordinator 127.0.0.1:{probe.getsockname()[1]} --hosts.processes {self.processes}"
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(2 // self.processes)}
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # each start after the first is short
        processes = []
        for number in range(self.processes):
            own = [*hosts.split(), "--hosts.process-id", str(number)] if self.processes > 1 else []
            with self.output(number).open("w") as output:
                process = subprocess.Popen([*command, *own], cwd=ROOT, env=environment, stdout=output, stderr=output)
                processes.append(process)
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()

    def output(self, number: int = 0) -> Path:
        """Return the file with what a process printed since the last start."""
        return self.workdir.with_suffix(f".{number}.log")

    def logged(self) -> int:
        """Return the last training step in the log."""
        return max((r["step"] for r in read_records(self.workdir) if r["kind"] == "train"), default=0)

    def saved(self) -> int:
        """Return the newest complete checkpoint, or 0; raise Failure if it is damaged."""
        step = max(saved_steps(self.workdir), default=0)
        if step and (damage := verify(self.workdir, step)):
            raise Failure(f"the checkpoint of step {step} counts as complete and is damaged: {damage}")
        return step

    def finish(self) -> None:
        """Run to the end; raise Failure if it does not get there."""
        with self.started() as processes:
            for number, process in enumerate(processes):
                if process.wait(timeout=PATIENCE):
                    raise Failure(f"exit code {process.returncode}: {self.output(number).read_text()}")

    def check_went_on(self, step: int) -> None:
        """Raise Failure if the last start, as far as it came to a step, did not go on after `step`."""
        printed = self.output().read_text()
        if step and "\nstep " in printed and f"going on after step {step}\n" not in printed:
            raise Failure(f"it did not go on after step {step}: {printed}")


def kill_once(run: Run, moment: str, chance: random.Random) -> Kill:
    """Start a run, kill all its processes at a moment, in any order, and look at what is left.

    Raises:
      Failure: it did not begin where it should, or what is left is not what it should be.
    """
    before = run.saved()
    with run.started() as processes:

        def wait_until(condition: Callable[[], object]) -> None:
            until = time.monotonic() + PATIENCE
            while not condition():
                if any(process.poll() is not None for process in processes) or time.monotonic() > until:
                    raise Failure(f"it ended by itself: {run.output().read_text()}")
                time.sleep(0.001)

        if moment == "starting":
            time.sleep(chance.uniform(0.0, 6.0))
        else:
            begin = before + chance.randrange(run.save_every // 2, 2 * run.save_every)
            wait_until(lambda: run.logged() > begin)
            if moment == "saving":
                wait_until(lambda: unfinished(run.workdir))
            time.sleep(chance.uniform(0.0, 0.03))  # within a step, or a later part of writing
        first, *others = chance.sample(processes, len(processes))
        first.kill()
        if first.wait() != -signal.SIGKILL:
            raise Failure(f"it ended by itself: {run.output().read_text()}")
        for process in others:  # which may end by themselves as soon as they miss the first
            time.sleep(chance.choice([0.0, 0.2]))
            process.kill()

    run.check_went_on(before)
    kill = Kill(moment, bool(unfinished(run.workdir)), run.logged(), run.saved())
    due = kill.logged - kill.logged % run.save_every
    if kill.saved < max(before, due - run.save_every):
        raise Failure(f"killed after step {kill.logged}, and the newest complete checkpoint is of step {kill.saved}")
    return kill


def leaves(workdir: Path) -> list[np.ndarray]:
    """Return parameters, statistics and optimizer state of the last checkpoint."""
    config = load_config(workdir)
    trainer = Trainer(config, load_inputs(workdir), load_data(config))
    return jax.tree.leaves(jax.device_get(restore(workdir, trainer.abstract_state())))


def records(workdir: Path) -> list[dict[str, Any]]:
    """Return what was recorded, but for times and starts."""
    changing = ("time", "images_per_second")
    kept = (record for record in read_records(workdir) if record["kind"] != "start")
    return [{name: value for name, value in record.items() if name not in changing} for record in kept]


def crash(folder: Path, *, kills: int, processes: int, seed: int, save_every: int = SAVE_EVERY) -> list[Kill]:
    """Make both runs in a folder and compare them; return the kills.

    Raises:
      Failure: something was lost.
    """
    chance = random.Random(seed)
    steps = 2 * kills * save_every  # more than come between two kills, so that the run lasts to the last one
    undisturbed, run = (Run(folder / name, steps, save_every, processes) for name in ("undisturbed", "killed"))
    undisturbed.finish()
    done = []
    for number in range(kills):
        done.append(kill_once(run, MOMENTS[number % len(MOMENTS)], chance))
        print(done[-1], flush=True)
    run.finish()
    run.check_went_on(done[-1].saved)
    for ours, expected in zip(leaves(run.workdir), leaves(undisturbed.workdir), strict=True):
        np.testing.assert_array_equal(ours, expected)
    expected_records = records(undisturbed.workdir)
    if records(run.workdir) != expected_records or len(expected_records) < steps:
        raise Failure("the records of the run differ from those of an undisturbed one")
    return done


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m reliability.crash", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1, help="that train together; default: 1")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, as far as a clock can repeat them")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = crash(Path(folder), kills=options.kills, processes=options.processes, seed=options.seed)
        except (Failure, AssertionError) as failure:
            print(f"FAILED: {failure}")
            return 1
    moments = ", ".join(f"{count} {moment}" for moment, count in Counter(kill.moment for kill in done).items())
    print(
        f"{options.kills} kills ({moments}; {sum(kill.half_written for kill in done)} left a half-written checkpoint)"
        f" in {2 * options.kills * SAVE_EVERY} steps of {options.processes} process(es), a checkpoint every"
        f" {SAVE_EVERY}: {time.monotonic() - began:.0f} s\n"
        f"most steps made again: {max(kill.logged - kill.saved for kill in done)}, and where no checkpoint was being"
        f" written {max((kill.logged - kill.saved for kill in done if not kill.half_written), default=0)};"
        f" the end has the bits of an undisturbed run"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
