"""A process that measures one peer of one case: it gets ready, says so, and then takes a turn whenever it is asked."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from benchmarks.cases import PEERS, Case, Prepared, UnavailableError

Task = Literal["turn", "profile", "digests"]
_STEPS = 100  # of a profile and of a digest


class Worker:
    """The process, from outside."""

    def __init__(self, case: Case, peer: str, seconds: float, log: Path, folder: Path | None = None):
        """Start it; the first reply is there when it is ready.

        Args:
          case, peer: what it measures.
          seconds: of a turn, about.
          log: file for what libraries print.
          folder: of another checkout, whose resnet_jax is measured.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, case, peer, seconds, log, folder))
        self.process.start()
        theirs.close()

    def ask(self, task: Task = "turn") -> None:
        """Let it take a turn, or do what else it can."""
        with contextlib.suppress(BrokenPipeError):  # reply() tells why
            self._connection.send(task)

    def reply(self, until: float) -> dict[str, Any]:
        """Return its reply, or {"error": "a word or two"} if it failed, died or was not ready by time.monotonic()."""
        if not self._connection.poll(max(0.0, until - time.monotonic())):
            return {"error": "out of time"}
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return {"error": f"died, exit code {self.process.exitcode}"}

    def close(self) -> None:
        """End it and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def _serve(connection: Connection, case: Case, peer: str, seconds: float, log: Path, folder: Path | None) -> None:
    os.setsid()  # a process group of its own, which is ended as a whole
    with log.open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    try:
        module, options = PEERS[peer]
        if folder is not None:
            sys.path.insert(0, str(folder))
            assert Path(importlib.import_module("resnet_jax").__path__[0]).parent == folder.resolve()
        prepared: Prepared = importlib.import_module(module).prepare(case, **options)
        calls = _calibrate(prepared, seconds)
        connection.send({"settings": prepared.settings, "compile_seconds": prepared.compile_seconds})
        while True:
            connection.send(_do(connection.recv(), prepared, calls))
    except EOFError:
        pass
    except Exception as error:  # whatever a library raises becomes a cell of the table
        traceback.print_exc()
        connection.send({"error": _in_a_word(error)})


def _do(task: Task, prepared: Prepared, calls: int) -> dict[str, Any]:
    some = max(1, _STEPS // prepared.steps_per_call)
    if task == "digests":
        assert prepared.digest
        return {"digests": [prepared.digest(some) for _ in range(2)], "digest_steps": some * prepared.steps_per_call}
    prepared.compute(1)  # memory that was given back while the others worked is slow at first
    if task == "profile":
        from benchmarks.gpu.profile import profile

        return {"profile": profile(lambda: prepared.compute(some), some * prepared.steps_per_call)}
    steps = calls * prepared.steps_per_call
    ms = 1000 * _timed(prepared, calls) / steps
    return {"ms": ms, "steps": steps, "peak_bytes": prepared.peak_device_bytes() or _peak_host_bytes()}


def _timed(prepared: Prepared, calls: int) -> float:
    """Return the seconds that so many calls take, from an idle device to an idle device."""
    began = time.perf_counter()
    prepared.compute(calls)
    return time.perf_counter() - began


def _calibrate(prepared: Prepared, seconds: float) -> int:
    """Warm up, and return how many calls take about that many seconds."""
    calls, taken = 1, _timed(prepared, 1)
    if taken < 2 * seconds:  # else one call is a turn, also where the first was slower than the others
        taken = _timed(prepared, 1)
    while taken < seconds / 4:
        calls = min(max(round(calls * seconds / 2 / taken), calls + 1), 10 * calls)
        taken = _timed(prepared, calls)
    return max(1, round(calls * seconds / taken))


def _peak_host_bytes() -> int | None:
    """Return the highest resident memory of this process so far (VmHWM), where the system tells."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _in_a_word(error: Exception) -> str:
    if isinstance(error, UnavailableError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    text = f"{type(error).__name__} {error}"
    if any(word in text for word in ("MemoryError", "RESOURCE_EXHAUSTED", "OutOfMemory", "out of memory")):
        return "out of memory"
    return type(error).__name__
