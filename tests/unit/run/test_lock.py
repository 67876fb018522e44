"""Two runs never share a work directory, and a dead one holds none."""

import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys

import numpy as np
import pytest
from tiny_runs import make_config

import resnet_jax.run.lock
from resnet_jax.data.types import Inputs, Preprocessing
from resnet_jax.errors import StorageError, UserError
from resnet_jax.run.lock import lock
from resnet_jax.run.workdir import create_workdir
from resnet_jax.training import train

HOLDER = """
import sys, time
from pathlib import Path
from resnet_jax.run.lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(resnet_jax.run.lock, "_PATIENCE", 0.0)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()


def test_the_holder_is_named(tmp_path, holder):
    named = rf"is in use by process {holder.pid} on {platform.node()} since 2"
    with pytest.raises(UserError, match=named) as refused, lock(tmp_path):
        pass
    assert refused.value.exit_code == 2
    assert json.loads((tmp_path / "lock").read_text())["pid"] == holder.pid  # the refused one left the file as it was


def test_the_lock_of_a_killed_process_is_none(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(resnet_jax.run.lock, "_PATIENCE", 5.0)
    holder.send_signal(signal.SIGKILL)  # it may still be ending when the lock is asked for
    with lock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "lock").read_text() == ""
    with lock(tmp_path):
        pass


def test_within_one_process_too(tmp_path):
    with lock(tmp_path), pytest.raises(UserError, match=f"by process {os.getpid()} on"), lock(tmp_path):
        pass


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("", False),
        ("{", False),
        ("[1]", False),
        (json.dumps({"pid": 2**22 + 1, "host": platform.node()}), False),  # above the largest pid
        (json.dumps({"pid": os.getpid(), "host": platform.node(), "since": "then"}), True),
        (json.dumps({"pid": 2**22 + 1, "host": "elsewhere"}), True),  # nobody here can tell
        (json.dumps({"pid": "x", "host": platform.node()}), True),
    ],
    ids=["empty", "cut", "list", "dead", "alive", "elsewhere", "senseless"],
)
def test_without_locks_in_the_file_system_the_file_decides(tmp_path, monkeypatch, text, refused):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (tmp_path / "lock").write_text(text)
    if refused:
        message = f"is in use by process .*if that process has died, delete {tmp_path}/lock"
        with pytest.raises(UserError, match=message), lock(tmp_path):
            pass
        assert (tmp_path / "lock").read_text() == text
    else:
        with lock(tmp_path):
            assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_folder_that_is_not_there(tmp_path):
    message = "cannot lock .*nowhere/lock: No such file or directory"
    with pytest.raises(StorageError, match=message), lock(tmp_path / "nowhere"):
        pass


def test_errors_of_what_is_done_meanwhile_are_its_own(tmp_path):
    with pytest.raises(BrokenPipeError), lock(tmp_path):
        raise BrokenPipeError


def test_a_second_run_is_refused_before_it_reads_data(tmp_path, monkeypatch):
    config = make_config(tmp_path / "run", steps=1)
    create_workdir(tmp_path / "run", config, Inputs((8, 8, 3), ("a", "b"), Preprocessing(np.zeros(3), np.ones(3))))
    monkeypatch.setattr("resnet_jax.training.load_data", None)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with lock(tmp_path / "run"):
        before.pop(tmp_path / "run" / "lock")
        with pytest.raises(UserError, match="run is in use by process"):
            train(make_config(tmp_path / "run", steps=2))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_two_that_begin_at_once(tmp_path, monkeypatch):
    (tmp_path / "run.new").mkdir()
    (tmp_path / "run.new" / "config.json").write_text("of the other")
    with lock(tmp_path / "run.new"), pytest.raises(UserError, match=r"run\.new is in use"):
        create_workdir(tmp_path / "run", make_config("run"), inputs=None)
    assert (tmp_path / "run.new" / "config.json").read_text() == "of the other"
    assert not (tmp_path / "run").exists()
