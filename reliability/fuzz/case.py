"""One case of the fuzzer: damage files, read them, and judge what comes of it."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import resource
import signal
import time
import traceback
import types
from pathlib import Path
from typing import Literal

from reliability.fuzz.reader import Damaged, Files, Reader
from resnet_jax.errors import CommandError
from resnet_jax.errors import printable

_LONGEST_MESSAGE = 3000  # characters


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a case may take: seconds of work (or three times as many in all), and bytes of memory more than before."""

    seconds: float = 10.0
    memory: int = 1 << 30


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a case; `detail` is a traceback or the message of a refusal."""

    kind: Literal["accepted", "refused", "failed"]
    detail: str
    seconds: float
    memory: int  # bytes that the peak lay above what was used before


class _TooLong(BaseException):
    """No Exception: a reader that handles all errors of a library is to be ended by it, too."""


def damaged_files(reader: Reader, valid: Files, seed: int, number: int) -> Damaged:
    """Return the files of a case, which depend on nothing but the seed, the reader and the number."""
    return reader.damage(random.Random(f"{seed} {reader.name} {number}"), valid)


def run_case(reader: Reader, folder: Path, damaged: Damaged, limits: Limits) -> Outcome:
    """Read the files in `folder`, of which those in `damaged` are damaged.

    A reader may return something or raise CommandError with a line about the file; all else is a failure.
    """
    used = _memory("VmRSS")
    began = time.perf_counter()
    kind, detail = _read(reader, folder, damaged, limits.seconds)
    seconds = time.perf_counter() - began
    memory = max(_memory("VmHWM") - used, 0)
    if kind != "failed" and memory > limits.memory:
        kind, detail = "failed", f"took {memory >> 20:,} MiB of memory; then: {detail}"
    return Outcome(kind, detail, seconds, memory)


def _read(
    reader: Reader, folder: Path, damaged: Damaged, seconds: float
) -> tuple[Literal["accepted", "refused", "failed"], str]:
    def too_long(signum: int, frame: types.FrameType | None) -> None:
        raise _TooLong(f"not done after {seconds:g} seconds")

    before = {number: signal.signal(number, too_long) for number in (signal.SIGPROF, signal.SIGALRM)}
    _set_timers(seconds)
    try:
        reader.read(folder, frozenset(damaged))
    except CommandError as error:
        _set_timers(0)
        problem = _problem(error, folder)
        return ("failed", f"{problem}: {traceback.format_exc()}") if problem else ("refused", str(error))
    except KeyboardInterrupt:
        raise
    except BaseException:
        return "failed", traceback.format_exc()
    finally:
        _set_timers(0)
        for number, handler in before.items():
            signal.signal(number, handler)
    return "accepted", ""


def _set_timers(seconds: float) -> None:
    """Set an alarm after so many seconds of work, or three times as many in all: others may be at work here, too."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 3 * seconds)


def _problem(error: CommandError, folder: Path) -> str:
    """Say why a refusal is none that a user is helped by; nothing if it is one."""
    message = printable(str(error))  # as commands print it
    if len(message) > _LONGEST_MESSAGE:
        return f"the message has {len(message):,} characters"
    if str(folder) not in message:
        return "the message does not name the file"
    cause: BaseException | None = error
    while cause is not None:
        # Caught here because of the limit; without one it would have filled the memory.
        if isinstance(cause, MemoryError) or "can't allocate memory" in str(cause):
            return "more memory was wanted than there is"
        cause = cause.__cause__ or cause.__context__
    return ""


def limit_memory(limits: Limits) -> None:
    """Let this process have so much more address space that a case beyond its limit is noticed, and no more."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + 2 * limits.memory + (1 << 30), hard))


def forget_peak() -> None:
    """Begin to measure the peak of the memory anew, where Linux lets us."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
