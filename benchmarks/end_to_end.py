"""Whole commands: train.py on made-up CIFAR-10, and two starts that share a compilation cache."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.driver import OUT_OF_TIME
from benchmarks.process import ROOT, Worker, WorkerError, environment
from resnet_jax.data.sources.cifar10 import BINARY, RECORD_BYTES, RECORDS_PER_FILE

# Of train.py. On a GPU it logs, evaluates and saves as often as by default.
_OPTIONS = {"cpu": {"steps": 60, "log-every": 10}, "gpu": {"steps": 10_000}}


def write_cifar10(folder: Path) -> None:
    """Write random images and labels in the official binary layout (185 MB)."""
    rng = np.random.default_rng(0)
    folder = folder / BINARY.folder
    folder.mkdir(parents=True)
    for name in BINARY.files:
        records = rng.integers(0, 256, (RECORDS_PER_FILE, RECORD_BYTES), np.uint8)
        records[:, 0] %= 10  # the label
        records.tofile(folder / name)


def run_train_py(case: Case, *, data: Path | None, deadline: float, logs: Path) -> dict[str, dict[str, Any]]:
    """Run train.py of the network's configuration for a while.

    Args:
      case: the network; the configuration decides all else.
      data: folder of CIFAR-10; None to make some up.
      deadline: of time.monotonic().
      logs: folder for what it prints.

    Returns:
      "ours": "status", "steps", "images_per_second" (of each record of metrics.jsonl but the first),
      "overall_images_per_second" (with evaluations and checkpoints), "compile_seconds", and "seconds" of the whole
      command, from start to exit.
    """
    options = _OPTIONS[case.platform]
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as temporary:
        workdir = Path(temporary, "run")
        if data is None:
            data = Path(temporary, "data")
            write_cifar10(data)
        command = [sys.executable, "train.py", f"configs/cifar10_{case.network}.py", "--data.dir", str(data.resolve())]
        for name, value in {"workdir": workdir, **options}.items():
            command += [f"--run.{name}", str(value)]
        began = time.monotonic()
        status = _run(command, logs / f"{case.name}.log", deadline)
        seconds = time.monotonic() - began
        metrics = workdir / "metrics.jsonl"
        records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    result: dict[str, Any] = {"status": status, "steps": options["steps"], "seconds": seconds}
    if status == "ok":
        start, last = records[0], records[-1]
        result["compile_seconds"] = start["compile_seconds"]
        result["images_per_second"] = [r["images_per_second"] for r in records if r["kind"] == "train"][1:]
        images = options["steps"] * case.batch_size
        result["overall_images_per_second"] = images / (last["time"] - start["time"])
    return {"ours": result}


def _run(command: list[str], log: Path, deadline: float) -> str:
    """Return "ok", or in a word why the command did not end well."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(None), stdout=output, stderr=output, start_new_session=True
        )
    try:
        code = process.wait(max(0.0, deadline - time.monotonic()))
        return "ok" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        return OUT_OF_TIME
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_starts(case: Case, *, deadline: float, logs: Path) -> dict[str, dict[str, Any]]:
    """Start a training process twice with one compilation cache, empty at first.

    Returns:
      "first" and "second": "status", "seconds" from the start of the process to the end of its first step, and
      "compile_seconds" of these.
    """
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as cache:
        for name in ("first", "second"):
            began = time.monotonic()
            with Worker(case, "ours", log=logs / f"{case.name}.{name}.log", cache=Path(cache)) as worker:
                until = min(began + case.timeout, deadline)
                try:
                    worker.send("prepare")
                    compile_seconds = worker.receive(until)["compile_seconds"]
                    worker.send("time", calls=1)
                    worker.receive(until)
                    seconds = time.monotonic() - began
                    results[name] = {"status": "ok", "seconds": seconds, "compile_seconds": compile_seconds}
                except WorkerError as error:
                    late = error.status == "timeout" and time.monotonic() >= deadline
                    results[name] = {"status": OUT_OF_TIME if late else error.status, "detail": error.detail}
    return results
