"""Train a tiny network for many steps and watch the process from outside: python -m reliability.long_run [--streamed].

Memory, open files and threads of train.py and its worker processes are read from /proc (Linux) all the while, images/s
from metrics.jsonl. Logs, evaluations and checkpoints come so often that each repeats hundreds of times. What grows
after the warm-up, the first tenth of the run, is a leak: the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from resnet_jax.run.records import read_records

ROOT = Path(__file__).parents[1]
PARTS = 10  # of a run; the first is the warm-up

_TINY = "--model.depth 8 --model.bn-group-size 8 --data.batch-size 8 --data.eval-batch-size 120"
_RESIDENT = "--run.log-every 20 --run.eval-every 100 --run.save-every 100"
# Each evaluation starts worker processes of its own, which takes seconds.
_STREAMED = (
    "--data.name folder --data.image-size 32 --data.shorter-side 32 48 --data.workers 2 --data.eval-batch-size 8"
    " --data.mean 0.5 0.5 0.5 --run.log-every 20 --run.eval-every 500 --run.save-every 100"
)

# Of smaps_rollup: memory of the processes' own and what they share among them, in memory or swapped out. Pages of files
# are left out: the system drops them when it needs room, and reads them again.
_MEMORY = re.compile(r"^(?:Pss_Anon|Pss_Shmem|SwapPss): +(\d+) kB$", re.MULTILINE)


class Usage(NamedTuple):
    """What a process and its children use: memory in MiB (what they share is counted once), open files, threads."""

    memory: float
    files: int
    threads: int


class Part(NamedTuple):
    """A tenth of the run.

    Attributes:
      memory: median, in MiB.
      files, threads: fewest; evaluations and checkpoints have more for a moment.
      images_per_second: median of the training records.
    """

    memory: float
    files: int
    threads: int
    images_per_second: float


class Limits(NamedTuple):
    """How much the last part may be above the second, or memory above the least since then: in %, files, threads, in %.

    Pools start their last threads late, and pipes of ended workers are closed some time later: what is lost at every
    evaluation or checkpoint adds up to far more.
    """

    memory: float = 5.0
    files: int = 8
    threads: int = 2
    slower: float = 20.0


def look(pid: int) -> Usage | None:
    """Return what a process and all below it use now; None if it has ended."""
    process = Path("/proc", str(pid))
    try:
        memory = sum(map(int, _MEMORY.findall((process / "smaps_rollup").read_text()))) / 1024
        tasks = list((process / "task").iterdir())
        total = Usage(memory, len(os.listdir(process / "fd")), len(tasks))
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return None
    below = [used for child in children if (used := look(child))]
    return Usage(*map(sum, zip(total, *below, strict=True)))


def watch(folder: Path, steps: int, *, streamed: bool = False, options: Sequence[str] = ()) -> list[Part]:
    """Train in a process of its own below an empty folder, and sum the run up by tenths of its steps.

    Raises:
      RuntimeError: the run failed, or a tenth was not seen.
    """
    run, log = folder / "run", folder / "train.log"
    command = [sys.executable, "train.py", "configs/digits_resnet20.py", *_TINY.split()]
    command += (_STREAMED if streamed else _RESIDENT).split()
    if streamed:
        write_images(folder / "images")
        command += ["--data.dir", str(folder / "images")]
    command += ["--optim.boundaries", str(steps), "--run.steps", str(steps), "--run.workdir", str(run), *options]
    samples: list[tuple[float, Usage]] = []
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        try:
            while process.poll() is None:
                if used := look(process.pid):
                    samples.append((time.time(), used))
                time.sleep(0.1)
        finally:
            process.kill()  # unless it has ended
            process.wait()
    if process.returncode:
        raise RuntimeError(f"train.py ended with {process.returncode}: {log.read_text().strip()[-2000:]}")
    return summarize(samples, read_records(run), steps)


def write_images(folder: Path) -> None:
    """Write FOLDER/train and FOLDER/val: noise of two classes."""
    random = np.random.RandomState(0)
    for split, count in (("train", 32), ("val", 4)):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                noise = random.randint(0, 256, (48, 64, 3)).astype(np.uint8)
                Image.fromarray(noise).save(folder / split / label / f"{number}.jpg")


def summarize(samples: Sequence[tuple[float, Usage]], records: Sequence[dict[str, Any]], steps: int) -> list[Part]:
    """Sum samples (when, what) and records up by tenths of the steps; raise RuntimeError if one has none."""
    train = [record for record in records if record["kind"] == "train"]
    began = records[0]["time"]
    parts = []
    for number in range(PARTS):
        logged = [record for record in train if number < record["step"] * PARTS / steps <= number + 1]
        ended = logged[-1]["time"] if logged else began
        seen = [used for when, used in samples if began < when <= ended]
        if not seen:
            raise RuntimeError(f"part {number + 1} of {PARTS} of the run was not seen: take more --steps")
        memory = median(used.memory for used in seen)
        speed = median(record["images_per_second"] for record in logged)
        parts.append(Part(memory, min(used.files for used in seen), min(used.threads for used in seen), speed))
        began = ended
    return parts


def to_table(parts: Sequence[Part]) -> str:
    """Return a Markdown table."""
    rows = ["| part | memory, MiB | open files | threads | images/s |", "|---|---:|---:|---:|---:|"]
    for number, part in enumerate(parts, 1):
        rows.append(
            f"| {number} | {part.memory:,.1f} | {part.files} | {part.threads} | {part.images_per_second:,.0f} |"
        )
    return "\n".join(rows)


def find_growth(parts: Sequence[Part], limits: Limits) -> list[str]:
    """Return a line for each quantity that has grown too much after the first part."""
    first, last = parts[1], parts[-1]
    # Above the least: what the compiler used may be given back at any time, and would hide that the rest grows.
    grown = 100 * (last.memory / min(part.memory for part in parts[1:]) - 1)
    slower = 100 * (first.images_per_second / last.images_per_second - 1)
    problems = [
        (grown > limits.memory, f"memory grew by {grown:.1f} % (limit {limits.memory:g} %)"),
        (last.files - first.files > limits.files, f"open files grew from {first.files} to {last.files}"),
        (last.threads - first.threads > limits.threads, f"threads grew from {first.threads} to {last.threads}"),
        (slower > limits.slower, f"a step takes {slower:.1f} % longer (limit {limits.slower:g} %)"),
    ]
    return [line for wrong, line in problems if wrong]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m reliability.long_run", description=__doc__.partition(":")[0])
    parser.add_argument("--steps", type=int, default=20_000, help="training steps (default 20,000)")
    parser.add_argument("--streamed", action="store_true", help="from image files by worker processes, not in memory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="long-run-") as temporary:
        try:
            parts = watch(Path(temporary), options.steps, streamed=options.streamed)
        except RuntimeError as error:
            parser.exit(2, f"error: {error}\n")
    print(to_table(parts))
    problems = find_growth(parts, Limits())
    print("\n".join(problems) or "nothing grows")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
