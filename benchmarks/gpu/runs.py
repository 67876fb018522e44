"""Networks trained to the end, in as many calls as it takes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.driver import ROOT

_KEPT = ("config.json", "inputs.json", "metrics.jsonl", "curves.png")


class Run(NamedTuple):
    """A network that is trained.

    Attributes:
      config: a name in configs/.
      args: of train.py.
      out: folder for its work directory, which is packed into one file while it is unfinished; of a finished run the
        records and the weights stay.
      resume: folder that may have it from an earlier call, packed or not.
      stop_seconds: before the end, when it is told to save and stop.
    """

    config: str
    args: list[str]
    out: Path
    resume: Path | None
    stop_seconds: float

    @property
    def workdir(self) -> Path:
        return self.out / "runs" / self.config

    @property
    def _packed(self) -> Path:
        return self.workdir.with_name(f"{self.config}.tar.gz")

    def go_on(self, until: float) -> dict[str, Any]:
        """Train until it is finished or time.monotonic() is near `until`; see Piece.make."""
        self._fetch()
        begun, before = time.monotonic(), _last_step(self.workdir)
        command = [sys.executable, "train.py", f"configs/{self.config}.py", *self.args]
        log = self.out / "logs" / f"{self.config}.log"
        with log.open("ab") as file:
            command += ["--run.workdir", str(self.workdir.resolve())]
            process = subprocess.Popen(
                command, cwd=ROOT, env=_environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, until - self.stop_seconds - time.monotonic()))
            finally:  # also where this process is told to end
                _stop(process, max(until - time.monotonic(), 5.0))
        found = {"begun_at": before, "seconds": round(time.monotonic() - begun, 1), **_summary(self.workdir)}
        if process.returncode == 0:
            return found | self._keep()
        if self.workdir.is_dir():
            self._pack()
        if process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM):  # the latter before it had begun
            return found | {"error": "out of time"}
        lines = log.read_text(errors="replace").strip().splitlines() or [""]
        return found | {"error": f"exit code {process.returncode}: {lines[-1][-300:]}"}

    def _fetch(self) -> None:
        """Put the work directory where it belongs, if there is one."""
        if self.workdir.is_dir():
            return
        self.workdir.parent.mkdir(parents=True, exist_ok=True)
        folders = [self.out / "runs", *((self.resume / "runs", self.resume) if self.resume else ())]
        for folder in folders:
            packed = folder / self._packed.name
            if packed.is_file():
                with tarfile.open(packed) as archive:
                    archive.extractall(self.workdir.parent, filter="data")
                return
            if (folder / self.config).is_dir():
                # Without the modes, which may forbid to write.
                shutil.copytree(folder / self.config, self.workdir, copy_function=shutil.copyfile)
                for path in (self.workdir, *self.workdir.rglob("*")):
                    path.chmod(0o755 if path.is_dir() else 0o644)
                return

    def _pack(self) -> None:
        """Make one file of the work directory, which is removed."""
        new = self._packed.with_suffix(".new")
        with tarfile.open(new, "w:gz", compresslevel=1) as archive:
            archive.add(
                self.workdir, self.config, filter=lambda member: None if "tensorboard" in member.name else member
            )
        new.replace(self._packed)
        shutil.rmtree(self.workdir)

    def _keep(self) -> dict[str, Any]:
        """Keep records and weights of a finished run, and remove its work directory."""
        finished = self.out / "finished" / self.config
        finished.mkdir(parents=True, exist_ok=True)
        weights = finished / f"{self.config}.safetensors"
        command = [sys.executable, "-m", "resnet_jax", "export", str(self.workdir.resolve())]
        command += ["--format", "safetensors", "--names", "resnet_jax", "--out", str(weights.resolve())]
        export = subprocess.run(command, cwd=ROOT, env=_environment() | {"JAX_PLATFORMS": "cpu"}, capture_output=True)
        for name in _KEPT:
            if (self.workdir / name).is_file():
                shutil.copyfile(self.workdir / name, finished / name)
        if export.returncode:
            self._pack()
            return {"weights": export.stderr.decode(errors="replace").strip()[-300:]}
        shutil.rmtree(self.workdir)
        self._packed.unlink(missing_ok=True)
        return {"weights": str(weights.relative_to(self.out))}


def _environment() -> dict[str, str]:
    """A user's: programs are compiled once, and JAX takes the memory that it takes."""
    ours = ("JAX_ENABLE_COMPILATION_CACHE", "XLA_PYTHON_CLIENT_PREALLOCATE")
    return {name: value for name, value in os.environ.items() if name not in ours}


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process, which leads a group, with all others of the group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _stop(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Let a training save and end, within the seconds."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    kill(process)


def _records(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _last_step(workdir: Path) -> int:
    return max((record["step"] for record in _records(workdir)), default=0)


def _summary(workdir: Path) -> dict[str, Any]:
    """Return the last step, the rate, and the last test errors of a run."""
    records = _records(workdir)
    rates = [record["images_per_second"] for record in records if "images_per_second" in record]
    errors = [record["error"] for record in records if record["kind"] == "test"]
    return {
        "step": _last_step(workdir),
        "images_per_second": statistics.median(rates) if rates else None,
        "test_error": errors[-1] if errors else None,
        "last_test_errors": errors[-10:],
    }
