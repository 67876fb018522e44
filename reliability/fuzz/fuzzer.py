"""Feed damaged and hostile files to every reader: python -m reliability.fuzz [--cases N] [--seed S] [--reader NAME ...]

A reader may return what is sound, or refuse the file in one line that names it (CommandError). Any other exception, a
crash of the process, more than some seconds or a gigabyte is a failure: the files are kept, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib
import importlib.util
import multiprocessing
import os
import shutil
import tempfile
import time
import warnings
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from reliability.fuzz.case import Limits, Outcome, damaged_files
from reliability.fuzz.reader import Reader
from reliability.fuzz.worker import Lines, Task, work, write

_STARTING = 120.0  # seconds that a process may take to import everything
_PATIENCE = 20.0  # seconds without a word, and six times the limit of a case: it hangs where no signal is heard
_SHOWN = 5  # failures of a reader whose files are kept


@dataclasses.dataclass
class Tally:
    """What came of the cases of a reader."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    seconds: float = 0.0  # of the slowest case
    memory: int = 0  # bytes of the largest
    lines: dict[str, Lines] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)

    @property
    def cases(self) -> int:
        return sum(self.counts.values())

    def add(self, outcome: Outcome) -> None:
        """Count a case."""
        self.counts[outcome.kind] += 1
        self.seconds, self.memory = max(self.seconds, outcome.seconds), max(self.memory, outcome.memory)

    def cover(self, lines: dict[str, Lines]) -> None:
        """Add lines that another process has executed."""
        for file, found in lines.items():
            before = self.lines.get(file)
            self.lines[file] = Lines(found.all, found.executed | (before.executed if before else frozenset()))


class Fuzzer:
    """Hands cases to processes and notices when one of these dies or does not answer."""

    def __init__(self, module: str, seed: int, limits: Limits, kept: Path):
        """Take the module that has READERS, and where files that make a reader fail are kept."""
        self.readers: dict[str, Reader] = importlib.import_module(module).READERS
        self._module, self._seed, self._limits, self._kept = module, seed, limits, kept
        self.tallies = {name: Tally() for name in self.readers}
        self._context = multiprocessing.get_context("spawn")

    def run(self, cases: dict[str, int], workers: int) -> None:
        """Run so many cases of each reader."""
        with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
            running: dict[Connection, _Worker] = {}
            for number in range(workers):
                tasks = [Task(name, number, workers, count) for name, count in cases.items() if number < count]
                self._start(running, tasks, Path(temporary, str(number)))
            while running:
                heard = wait(list(running), timeout=1.0)
                for connection in list(running):
                    worker = running[connection]
                    if connection in heard:
                        worker.heard = time.monotonic()
                        try:
                            self._take(worker, connection.recv())
                        except EOFError:
                            self._ended(running, connection)
                    elif time.monotonic() - worker.heard > worker.patience(self._limits):
                        worker.process.kill()  # it hangs where Python's signals do not reach

    def _start(self, running: dict[Connection, _Worker], tasks: list[Task], folder: Path) -> None:
        if not tasks:
            return
        shutil.rmtree(folder, ignore_errors=True)
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=work, args=(theirs, self._module, tasks, self._seed, self._limits, folder), daemon=True
        )
        process.start()
        theirs.close()
        running[ours] = _Worker(process, folder, tasks, time.monotonic())

    def _take(self, worker: _Worker, message: tuple[Any, ...]) -> None:
        match message:
            case ("begin",):
                worker.begun = True
            case "case", str(name), int(number), Outcome() as outcome:
                self.tallies[name].add(outcome)
                task = worker.tasks[0]
                worker.tasks[0] = task._replace(first=number + task.step)
                if outcome.kind == "failed":
                    self._keep(name, number, outcome.detail)
            case "coverage", str(name), dict(lines):
                self.tallies[name].cover(lines)
                worker.tasks.pop(0)
            case "error", str(text):
                raise RuntimeError(f"the fuzzer itself is broken:\n{text}")

    def _ended(self, running: dict[Connection, _Worker], connection: Connection) -> None:
        """Go on behind the case at which a process died."""
        worker = running.pop(connection)
        connection.close()
        worker.process.join()
        if not worker.tasks:
            return
        task, code = worker.tasks[0], worker.process.exitcode
        if not worker.begun:
            raise RuntimeError(f"the process that reads files ended with exit code {code} before it read any")
        detail = f"the process died: exit code {code} (negative: of a signal)"
        self.tallies[task.reader].add(Outcome("failed", detail, 0.0, 0))
        self._keep(task.reader, task.first, detail)
        left = [task._replace(first=task.first + task.step), *worker.tasks[1:]]
        self._start(running, [task for task in left if task.first < task.stop], worker.folder)

    def _keep(self, name: str, number: int, detail: str) -> None:
        tally = self.tallies[name]
        where = self._kept / f"{name}-seed{self._seed}-case{number}"
        tally.failures.append(f"{name}, case {number}: {detail.strip().splitlines()[-1][:300]}; kept in {where}")
        if len(tally.failures) <= _SHOWN:
            shutil.rmtree(where, ignore_errors=True)
            reader = self.readers[name]
            damaged = damaged_files(reader, reader.make(), self._seed, number)
            write(where, {path: content for path, content in damaged.items() if content is not None})
            (where / "failure.txt").write_text(f"{', '.join(damaged)}\n{detail}\n", errors="replace")


@dataclasses.dataclass
class _Worker:
    process: Any
    folder: Path
    tasks: list[Task]  # the first is at work
    heard: float  # when it last sent something, time.monotonic()
    begun: bool = False  # whether it has read a file

    def patience(self, limits: Limits) -> float:
        return 6 * limits.seconds + _PATIENCE if self.begun else _STARTING


def share_out(readers: dict[str, Reader], cases: int) -> dict[str, int]:
    """Divide cases among readers, in proportion to their shares; at least so many in all."""
    whole = sum(reader.share for reader in readers.values())
    return {name: -(-cases * reader.share // whole) for name, reader in readers.items()}


def table(tallies: dict[str, Tally]) -> str:
    """Return a line for each reader, and the sums."""
    head = f"{'reader':<18}{'cases':>7}{'accepted':>10}{'refused':>9}{'failed':>8}"
    head += f"{'slowest':>10}{'memory':>9}{'lines':>16}"
    rows = [head, "-" * len(head)]
    whole = Tally()
    for name, tally in tallies.items():
        rows.append(_row(name, tally))
        whole.counts += tally.counts
        whole.seconds, whole.memory = max(whole.seconds, tally.seconds), max(whole.memory, tally.memory)
        whole.cover(tally.lines)
    return "\n".join([*rows, "-" * len(head), _row("all", whole)])


def _row(name: str, tally: Tally) -> str:
    covered = sum(len(lines.executed) for lines in tally.lines.values())
    lines = sum(len(lines.all) for lines in tally.lines.values())
    share = f"{100 * covered / lines:.0f} % of {lines:,}" if lines else ""
    counts = "".join(
        f"{tally.counts[kind]:>{width},}" for kind, width in (("accepted", 10), ("refused", 9), ("failed", 8))
    )
    return f"{name:<18}{tally.cases:>7,}{counts}{1000 * tally.seconds:>7,.0f} ms{tally.memory >> 20:>5,} MiB{share:>16}"


def main(args: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser("python -m reliability.fuzz", description="Feed damaged files to every reader.")
    parser.add_argument("--cases", type=int, default=12_000, help="in all; default 12000")
    parser.add_argument("--seed", type=int, default=0, help="of the damage; default 0")
    parser.add_argument("--reader", action="append", metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: cores")
    parser.add_argument("--seconds", type=float, default=Limits.seconds, help="of work for a case; default 10")
    parser.add_argument("--memory", type=int, default=Limits.memory >> 20, help="MiB for a case; default 1024")
    parser.add_argument("--keep", type=Path, default=Path("fuzz_failures"), help="folder for files that break a reader")
    parser.add_argument("--module", default="reliability.fuzz.readers", help="that has READERS; default: ours")
    options = parser.parse_args(args)
    warnings.simplefilter("ignore")  # of libraries, about what damaged files hold
    began = time.monotonic()
    limits = Limits(options.seconds, options.memory << 20)
    fuzzer = Fuzzer(options.module, options.seed, limits, options.keep)
    names = options.reader or list(fuzzer.readers)
    if unknown := set(names) - fuzzer.readers.keys():
        parser.error(f"no reader {', '.join(sorted(unknown))}: choose of {', '.join(fuzzer.readers)}")
    for name in list(names):
        needs = fuzzer.readers[name].needs
        if needs and importlib.util.find_spec(needs) is None:
            print(f"{name}: left out, {needs} is not installed")
            names.remove(name)
    readers = {name: fuzzer.readers[name] for name in names}
    fuzzer.run(share_out(readers, options.cases), max(options.workers, 1))
    tallies = {name: fuzzer.tallies[name] for name in names}
    print(table(tallies))
    failures = [line for tally in tallies.values() for line in tally.failures]
    print(f"{sum(tally.cases for tally in tallies.values()):,} cases of seed {options.seed} in"
          f" {time.monotonic() - began:.0f} s; {len(failures):,} failures")  # fmt: skip
    for line in failures:
        print(line)
    return 1 if failures else 0
