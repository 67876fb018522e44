"""Worker processes change no result, and none is left when one of them, or their parent, ends."""

from __future__ import annotations

import errno
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import psutil
import pytest
from endless_task import fail_or_go_on
from image_files import Colours, write_folder
from paths import ROOT, TESTS

from resnet_jax.data.augment import scale_window
from resnet_jax.data.processes import run_tasks
from resnet_jax.data.streamed import training_batches
from resnet_jax.data.tools.check import check
from resnet_jax.data.tools.pack import pack
from resnet_jax.data.tools.reencode import PackOptions
from resnet_jax.data.tools.statistics import compute_statistics
from resnet_jax.data.types import EncodedImages, HostBatch
from resnet_jax.errors import CommandError, UserError

WAIT = 60  # seconds, where nothing but a process that lives on takes so long


def read(images: EncodedImages, *, workers: int) -> list[HostBatch]:
    window = scale_window(16, (16, 20))
    with training_batches(
        images, window, size=16, flip=True, batch_size=8, seed=3, step=2, workers=workers
    ) as batches:  # fmt: skip
        return [next(batches) for _ in range(4)]


def test_batches_are_the_same() -> None:
    images = Colours(21, broken=(4,))
    for batch, expected in zip(read(images, workers=2), read(images, workers=0), strict=True):
        for found, array in zip(batch, expected, strict=True):
            np.testing.assert_array_equal(found, array)


def test_statistics_are_the_same() -> None:
    images = Colours(100, broken=(4,))
    for found, expected in zip(*(compute_statistics(images, 16, workers=workers) for workers in (1, 2)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_tools_find_and_write_the_same(tmp_path: pathlib.Path) -> None:
    root = write_folder(tmp_path / "in", train=50)
    (root / "train/bee/7.jpeg").write_bytes(b"no image")
    assert check(root, workers=2) == check(root, workers=1)
    for workers in (1, 2):
        pack(root, tmp_path / str(workers), PackOptions(), workers=workers, shard_images=20)
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_an_error_in_a_worker_is_told() -> None:
    with pytest.raises(UserError, match="100 training images in a row cannot be read"):
        read(Colours(9, broken=tuple(range(9))), workers=1)


class Deadly(Colours):
    def read(self, index: int) -> tuple[bytes, int]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_killed_worker_is_an_error() -> None:
    with pytest.raises(CommandError, match=r"worker process that reads images was killed: .* fewer --data.workers"):
        read(Deadly(9), workers=1)


def test_too_little_shared_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __next__(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    window = scale_window(16, (16, 20))
    with training_batches(Colours(9), window, size=16, flip=True, batch_size=2, seed=0, step=0, workers=0) as batches:
        batches.close()
        monkeypatch.setattr(batches, "_iterator", Full())
        with pytest.raises(CommandError, match="is full: make /dev/shm larger .* or none with --data.workers 0"):
            next(batches)


def test_others_end_when_one_fails() -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match="^the first task fails$"):
        list(run_tasks(fail_or_go_on, [0, 1, 2, 3], workers=2, images=1800))
    assert time.monotonic() - began < WAIT  # which any of the other three takes, and all of them are waited for


STREAM = """
import time
from image_files import Colours
from resnet_jax.data.augment import scale_window
from resnet_jax.data.streamed import training_batches

if __name__ == "__main__":
    batches = training_batches(
        Colours(9), scale_window(16, (16, 20)), size=16, flip=True, batch_size=8, seed=0, step=0, workers=2
    )
    next(batches)
    print("ready", flush=True)
    time.sleep(100)
"""
# The images of the second of four shards are waited for.
PACK = """
import sys, time
from pathlib import Path
from resnet_jax.data.tools.pack import pack
from resnet_jax.data.tools.reencode import PackOptions

def read_or_wait(path, read=Path.read_bytes):
    if path.match("train/bee/2.jpeg"):
        time.sleep(100)
    return read(path)

Path.read_bytes = read_or_wait  # in the worker processes, too: they run all of this but the last lines
if __name__ == "__main__":
    print("ready", flush=True)
    pack(Path(sys.argv[1]), Path(sys.argv[2]), PackOptions(), workers=2, shard_images=5)
"""


def kill_when(program: str, path: pathlib.Path, *arguments: object, ready: Callable[[], bool]) -> None:
    """Start a program, kill it when it is ready, and wait for the end of its worker processes."""
    path.write_text(program)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{TESTS}"}
    command = [sys.executable, str(path), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        until(ready)
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        assert len(workers) == 2
        process.send_signal(signal.SIGKILL)
    until(lambda: not any(map(lives, workers)))


def lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_readers_end_with_a_killed_program(tmp_path: pathlib.Path) -> None:
    kill_when(STREAM, tmp_path / "program.py", ready=lambda: True)


def test_packing_goes_on_after_a_kill(tmp_path: pathlib.Path) -> None:
    root, out = write_folder(tmp_path / "in", train=5), tmp_path / "out"
    pack(root, tmp_path / "whole", PackOptions(), shard_images=5)
    shards = {name for name in files(tmp_path / "whole") if name.endswith("array_record")}
    complete = shards - {"train-00001-of-00003.array_record"}
    sidecars = {f"{name}.json" for name in complete}
    kill_when(PACK, tmp_path / "program.py", root, out, ready=lambda: out.is_dir() and sidecars <= set(files(out)))
    assert not (out / "manifest.json").exists()
    written = {name: (out / name).stat().st_mtime_ns for name in complete}
    assert not pack(root, out, PackOptions(), shard_images=5)[1]
    assert files(out) == files(tmp_path / "whole")
    assert written == {name: (out / name).stat().st_mtime_ns for name in written}  # they are not written again
