"""What a process and its children use, as Linux tells it in /proc."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")  # to the second

# Of smaps_rollup: memory of the processes' own and what they share among them, in memory or swapped out. Pages of files
# are left out: the system drops them when it needs room, and reads them again.
_MEMORY = re.compile(r"^(?:Pss_Anon|Pss_Shmem|SwapPss): +(\d+) kB$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Sample:
    """What was seen at a moment: of a process and its children together.

    Attributes:
      step: of the training.
      memory: bytes; what processes share is counted once.
      files: open files.
      threads: threads.
      cpu_seconds: that were computed so far, also by children that have ended.
    """

    step: int
    memory: int
    files: int
    threads: int
    cpu_seconds: float

    def __add__(self, other: Sample) -> Sample:
        """Add what another process uses at the same step."""
        return Sample(
            self.step,
            self.memory + other.memory,
            self.files + other.files,
            self.threads + other.threads,
            self.cpu_seconds + other.cpu_seconds,
        )


def look(pid: int, step: int) -> Sample | None:
    """Return what a process and its children use now; None if it has ended."""
    total = _look_at_one(pid, step)
    for child in children(pid) if total else []:
        if total and (used := _look_at_one(child, step)):
            total += used
    return total


def children(pid: int) -> list[int]:
    """Return the processes below a process, and those below them."""
    found = []
    try:
        for task in Path("/proc", str(pid), "task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *children(child)]
    except OSError:  # it has ended
        pass
    return found


def _look_at_one(pid: int, step: int) -> Sample | None:
    process = Path("/proc", str(pid))
    try:
        memory = _MEMORY.findall((process / "smaps_rollup").read_text())
        ticks = (process / "stat").read_text().rpartition(")")[2].split()[11:15]  # its own, and of waited-for children
        files, threads = len(os.listdir(process / "fd")), len(os.listdir(process / "task"))
    except OSError:  # it has ended
        return None
    return Sample(step, sum(map(int, memory)) << 10, files, threads, sum(map(int, ticks)) / _TICK)
