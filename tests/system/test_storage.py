"""Disks that are full, read-only or slow: the run says so and stops or goes on, and what was complete stays."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from tiny_runs import assert_same_bits, make_config, saved_state, tiny_dataset, without_times

import resnet_jax.run.checkpoint
from resnet_jax.errors import Interrupted, StorageError, UserError
from resnet_jax.evaluate import evaluate
from resnet_jax.files import append_line
from resnet_jax.run.logs import RunLog
from resnet_jax.run.records import read_records
from resnet_jax.run.saved import saved_steps, unfinished, verify, write_checksums
from resnet_jax.run.workdir import create_workdir, load_config, load_inputs
from resnet_jax.training import train

A_LOG = r"(\S*/metrics\.jsonl|TensorBoard's events|curves\.png)"  # a small line finds room in the file's last block


@pytest.fixture(autouse=True, scope="module")
def dataset():
    with tiny_dataset():
        yield


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(make_config(workdir, log_every=1))
    return workdir


class Disk:
    """A file system of 8 MB of its own."""

    def __init__(self, path: Path):
        self.path = path

    def fill(self) -> None:
        """Leave no room at all."""
        with (self.path / "ballast").open("ab", buffering=0) as file:
            for size in (1 << 16, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    pass

    def clear(self) -> None:
        (self.path / "ballast").unlink()

    def set_read_only(self, value: bool) -> None:
        mode = "ro" if value else "rw"
        subprocess.run(["mount", "-o", f"remount,{mode}", self.path], check=True)


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield Disk(path)
    subprocess.run(["umount", "--lazy", path], check=True)


def at_step(monkeypatch, **actions):
    """Do something when the log is to record the training step `s5` and so on."""
    write = RunLog.train

    def act_and_write(self, step, *args, **kwargs):
        if action := actions.get(f"s{step}"):
            action()
        write(self, step, *args, **kwargs)

    monkeypatch.setattr(RunLog, "train", act_and_write)


def assert_ends_like(undisturbed, workdir, config):
    """Whatever happened, going on leads to the same bits and the same records of the steps."""
    train(config)
    assert_same_bits(saved_state(workdir, config), saved_state(undisturbed, config))
    ends = [without_times(read_records(path))[-1] for path in (workdir, undisturbed)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("on_log_error", ["stop", "continue"])
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_checkpoint_that_cannot_be_written_stops_the_run(undisturbed, disk, monkeypatch, capsys, fault, on_log_error):
    workdir = disk.path / "run"
    config = make_config(workdir, log_every=1, steps_per_dispatch=1, on_log_error=on_log_error)
    reason = "No space left on device" if fault == "full" else "Read-only file system"

    def wait_for_step_4():  # which is saved in the background
        while not saved_steps(workdir):
            time.sleep(0.01)

    if fault == "full":

        def break_it():
            wait_for_step_4()
            disk.fill()

        mend_it = disk.clear
    else:  # open files are closed first, as the kernel asks for
        fault_of_the_disk = OSError(30, reason)

        def break_it():
            wait_for_step_4()
            monkeypatch.setattr("resnet_jax.files.append_line", fail)
            monkeypatch.setattr("resnet_jax.run.events.EventFile.write", fail)
            monkeypatch.setattr("resnet_jax.run.logs.RunLog.__exit__", lambda *_: None)
            monkeypatch.setattr(resnet_jax.run.checkpoint, "write_checksums", fail)

        def fail(*_, **__):
            raise fault_of_the_disk

        mend_it = monkeypatch.undo
    with monkeypatch.context() as patch:
        at_step(patch, s6=break_it)
        with pytest.raises(StorageError) as stopped:
            train(config)
    message = str(stopped.value)
    assert reason in message
    assert "\n" not in message
    printed = capsys.readouterr()
    if on_log_error == "continue":
        assert f"cannot save a checkpoint in {workdir}/checkpoints: {reason}; the last complete one is of" in message
        assert re.search(rf"warning: cannot write {A_LOG}: {reason}; going on without\n", printed.err)
    else:
        assert re.match(rf"cannot write {A_LOG}: {reason}; run it again when that is mended, or add --run.on", message)
    assert saved_steps(workdir) == [4]
    assert verify(workdir, 4) is None
    mend_it()
    capsys.readouterr()
    with tiny_dataset():
        assert_ends_like(undisturbed, workdir, config)
    assert unfinished(workdir) == []


def test_without_logs_a_run_goes_on(undisturbed, disk, monkeypatch, capsys):
    workdir = disk.path / "run"
    config = make_config(workdir, log_every=1, steps_per_dispatch=1, save_every=12, on_log_error="continue")
    with monkeypatch.context() as patch:
        at_step(patch, s3=disk.fill, s11=disk.clear)
        train(config)
    assert_same_bits(saved_state(workdir, config), saved_state(undisturbed, config))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warnings
    assert all(re.fullmatch(rf"warning: cannot write {A_LOG}: No space left .*; going on without", w) for w in warnings)
    assert len(warnings) == len(set(warnings))  # once for each log
    assert all(line.endswith("}") for line in (workdir / "metrics.jsonl").read_text().splitlines())


def test_a_line_is_appended_whole_or_not_at_all(disk):
    path = disk.path / "log"
    with path.open("ab", buffering=0) as file:
        append_line(file, "first")
        disk.fill()
        with pytest.raises(OSError, match="No space"):
            append_line(file, "x" * 100_000)  # of which a page may find room
        assert path.read_bytes() == b"first\n"
        disk.clear()
        append_line(file, "second")
    assert path.read_bytes() == b"first\nsecond\n"


@pytest.mark.parametrize("with_state", [False, True])
def test_a_work_directory_is_complete_or_not_there(undisturbed, disk, with_state):
    config, inputs = load_config(undisturbed), load_inputs(undisturbed)
    state = saved_state(undisturbed, make_config(undisturbed)) if with_state else None
    if with_state:  # room for the first files only
        disk.fill()
        with (disk.path / "ballast").open("ab") as file:
            file.truncate(os.path.getsize(disk.path / "ballast") - 40_000)
    else:
        disk.fill()
    with pytest.raises((UserError, StorageError), match="No space left on device"):
        create_workdir(disk.path / "run", config, inputs, state)
    assert [path.name for path in disk.path.iterdir()] == ["ballast"]


def test_a_folder_that_may_only_be_read_is_evaluated(undisturbed, disk):
    shutil.copytree(undisturbed, disk.path / "run")
    disk.set_read_only(True)
    try:
        assert evaluate([disk.path / "run"]).count == 53
    finally:
        disk.set_read_only(False)


@pytest.mark.parametrize("on_log_error", ["stop", "continue"])
def test_an_output_that_is_full(tmp_path, on_log_error):
    options = f"--run.steps 3 --run.workdir {tmp_path / 'run'} --run.on-log-error {on_log_error} --run.log-every 1"
    network = "--model.depth 8 --data.batch-size 8 --model.bn-group-size 8"
    command = [sys.executable, "train.py", "configs/digits_resnet20.py", *options.split(), *network.split()]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=240)
    assert "Traceback" not in ended.stderr
    if on_log_error == "stop":
        assert ended.returncode == 1
        assert ended.stderr.startswith("error: cannot write the standard output: No space left on device; run it")
    else:
        assert ended.stderr.startswith("warning: cannot write the standard output: No space left on device; going on")
        assert saved_steps(tmp_path / "run") == [3]
        assert len(ended.stderr.splitlines()) <= 2


def test_training_goes_on_while_a_slow_disk_is_written_to(undisturbed, tmp_path, monkeypatch):
    """The checkpoint of step 4 is not complete before step 6 is recorded, or else the test would never end."""
    later = threading.Event()
    seen: list[list[int]] = []

    def write_when_later(folder, **options):
        assert later.wait(timeout=120)
        write_checksums(folder, **options)

    monkeypatch.setattr(resnet_jax.run.checkpoint, "write_checksums", write_when_later)
    config = make_config(tmp_path / "run", log_every=1, steps_per_dispatch=1)
    at_step(monkeypatch, s5=lambda: seen.append(saved_steps(tmp_path / "run")), s6=later.set)
    train(config)
    assert seen == [[]]
    assert_same_bits(saved_state(tmp_path / "run", config), saved_state(undisturbed, config))


def test_a_signal_waits_for_a_slow_checkpoint(tmp_path, monkeypatch):
    def write_slowly(folder, **options):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)  # another one while the state is written
        write_checksums(folder, **options)

    monkeypatch.setattr(resnet_jax.run.checkpoint, "write_checksums", write_slowly)
    at_step(monkeypatch, s3=lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="after step [45],") as stopped:  # heard of in the next dispatch or in this
        train(make_config(tmp_path / "run", log_every=1, steps_per_dispatch=1))
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    last = saved_steps(tmp_path / "run")[-1]
    assert f"after step {last}," in str(stopped.value)
    assert verify(tmp_path / "run", last) is None


def test_the_options_are_free_on_resume(undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    config = make_config(workdir, log_every=1, on_log_error="continue", steps=13)
    train(dataclasses.replace(config))
    assert saved_steps(workdir)[-1] == 13
    assert np.isfinite(read_records(workdir)[-1]["loss"])
