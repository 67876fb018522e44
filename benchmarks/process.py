"""Start a worker, ask it, end it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import Case

ROOT = Path(__file__).parents[1]


def environment(cache: Path | None) -> dict[str, str]:
    """Return the environment of a process that is measured: one GPU, and JAX's compilation cache in a folder or off."""
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        "JAX_ENABLE_COMPILATION_CACHE": "true" if cache else "false",
        **({"JAX_COMPILATION_CACHE_DIR": str(cache)} if cache else {}),
    }


class WorkerError(Exception):
    """A worker failed, died or took too long; the message is a word or two for the table."""

    def __init__(self, status: str, detail: str = ""):
        super().__init__(status)
        self.status, self.detail = status, detail


class Worker:
    """A process of benchmarks.worker; a context manager that ends it, and what it started, whatever happens."""

    def __init__(self, case: Case, peer: str, *, log: Path, cache: Path | None = None):
        """Start it.

        Args:
          case, peer: what it measures.
          log: file for what libraries print.
          cache: folder for JAX's compilation cache; None for no cache, so that compiling is measured cold.
        """
        self._scratch = tempfile.TemporaryDirectory(prefix="benchmarks-", ignore_cleanup_errors=True)
        env = {
            **environment(cache),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share the GPU
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            "TORCHINDUCTOR_CACHE_DIR": self._scratch.name,
            "TRITON_CACHE_DIR": self._scratch.name,
        }
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", peer, json.dumps(dataclasses.asdict(case))],
                cwd=ROOT,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # a process group of its own, which is ended as a whole
            )
        self._replies: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(line)
        self._replies.put(b"")  # it ended

    def send(self, do: str, **arguments: Any) -> None:
        """Ask for something; receive() returns the reply."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # receive() tells why
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self, until: float) -> dict[str, Any]:
        """Return the reply to the last request.

        Raises:
          WorkerError: it failed, died, or did not answer until that time.monotonic().
        """
        try:
            line = self._replies.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise WorkerError("timeout", "no answer in time") from None
        if not line:
            code = self._process.wait()
            raise WorkerError(signal.Signals(-code).name if code < 0 else f"exit code {code}", "the process died")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"], reply["detail"])
        return reply

    def close(self) -> None:
        """End it and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._scratch.cleanup()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
