"""What a worker asks of a peer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 1e-4  # of all peers; random labels diverge at higher rates


class Prepared(NamedTuple):
    """A peer that is compiled and ready to be timed.

    Attributes:
      run: run(calls) computes so many calls and returns when the device has done them.
      steps_per_call: batches in a call.
      compile_seconds: what comes before the first step can run; None where nothing is compiled.
      peak_device_bytes: highest use of device memory so far; None on the CPU.
      settings: what a reader must know, for the report.
      roofline: measure what the memory-bandwidth roofline needs; None where it is not defined.
    """

    run: Callable[[int], None]
    steps_per_call: int
    compile_seconds: float | None
    peak_device_bytes: Callable[[], int | None]
    settings: dict[str, str]
    roofline: Callable[[], dict[str, Any]] | None = None


class UnavailableError(Exception):
    """A peer that cannot take part on this machine; the message is a word or two for the table."""


def peak_host_bytes() -> int | None:
    """Return the highest resident memory of this process so far (VmHWM), where the system tells."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
