"""Train a tiny network for many steps and watch the process from outside: python -m reliability.long_run.

Memory, open files, threads and processor time of train.py and its worker processes are read from /proc (Linux) all the
while, the rate from metrics.jsonl. Logs, evaluations and checkpoints come so often that each repeats hundreds of times.
What grows after the warm-up, the first tenth of the run, is a leak: the exit code is 1.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reliability.usage import Sample, look
from resnet_jax.cli.arguments import ArgumentParser, run_command
from resnet_jax.errors import CommandError, UserError

ROOT = Path(__file__).parents[1]
PARTS = 10  # of a run; the first is the warm-up

_TINY = "--model.depth 8 --model.bn-group-size 8 --data.batch-size 8 --data.eval-batch-size 120"
_RESIDENT = "--run.log-every 20 --run.eval-every 100 --run.save-every 100"
# Each evaluation starts worker processes of its own, which takes seconds.
_STREAMED = (
    "--data.name folder --data.image-size 32 --data.shorter-side 32 48 --data.workers 2 --data.eval-batch-size 8"
    " --data.mean 0.5 0.5 0.5 --run.log-every 20 --run.eval-every 500 --run.save-every 100"
)


@dataclasses.dataclass(frozen=True)
class Part:
    """A tenth of the run.

    Attributes:
      memory: median, in MiB.
      files: least open files: evaluations and checkpoints open more for a moment.
      threads: fewest threads.
      images_per_second: median of the training records.
      seconds: that it took, with evaluations and checkpoints.
      cpu_seconds: of all cores, which other work on the machine changes less.
    """

    memory: float
    files: int
    threads: int
    images_per_second: float
    seconds: float
    cpu_seconds: float


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much the last part may be above the second, or memory above the least since then: in %, files, threads, in %.

    Pools start their last threads late, and pipes of ended workers are closed some time later: what is lost at every
    evaluation or checkpoint adds up to far more.
    """

    memory: float = 5.0
    files: int = 8
    threads: int = 2
    slower: float = 20.0


def main(args: Sequence[str]) -> int:
    """Run, and print a table and a verdict."""
    parser = ArgumentParser(prog="python -m reliability.long_run", description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=20_000, help="training steps (default 20,000)")
    parser.add_argument("--streamed", action="store_true", help="from image files by worker processes, not in memory")
    parser.add_argument("--memory", type=float, default=Limits.memory, help="growth allowed, in %% (default 5)")
    parser.add_argument("--slower", type=float, default=Limits.slower, help="slow-down allowed, in %% (default 20)")
    options = parser.parse_args(args)
    if options.steps < 20 * PARTS:
        raise UserError(f"--steps must be at least {20 * PARTS}; got {options.steps}")
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError("needs /proc as Linux has it")
    with tempfile.TemporaryDirectory(prefix="long-run-") as temporary:
        samples, records = watch(Path(temporary), options.steps, streamed=options.streamed)
    parts = summarize(samples, records, options.steps)
    print(to_table(parts))
    problems = find_growth(parts, Limits(memory=options.memory, slower=options.slower))
    print("\n".join(problems) or "nothing grows")
    return 1 if problems else 0


def watch(folder: Path, steps: int, *, streamed: bool) -> tuple[list[Sample], list[dict[str, Any]]]:
    """Train in a process of its own.

    Args:
      folder: an empty one.
      steps: training steps.
      streamed: whether images are read by worker processes.

    Returns:
      Samples, and the records of metrics.jsonl.

    Raises:
      CommandError: the run failed.
    """
    run, log = folder / "run", folder / "train.log"
    options = _TINY.split() + (_STREAMED if streamed else _RESIDENT).split()
    if streamed:
        write_images(folder / "images")
        options += ["--data.dir", str(folder / "images")]
    options += ["--optim.boundaries", str(steps), "--run.steps", str(steps), "--run.workdir", str(run)]
    samples = []
    with log.open("wb") as output:
        command = [sys.executable, "train.py", "configs/digits_resnet20.py", *options]
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                step = last_step(run / "metrics.jsonl")
                if step is not None and (sample := look(process.pid, step)):
                    samples.append(sample)
                time.sleep(0.1)
        finally:
            process.kill()  # unless it has ended
            process.wait()
    if process.returncode:
        raise CommandError(f"train.py ended with {process.returncode}: {log.read_text().strip()[-2000:]}")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return samples, records


def write_images(folder: Path) -> None:
    """Write FOLDER/train and FOLDER/val: noise of two classes."""
    random = np.random.RandomState(0)
    for split, count in (("train", 32), ("val", 4)):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                noise = random.randint(0, 256, (48, 64, 3)).astype(np.uint8)
                Image.fromarray(noise).save(folder / split / label / f"{number}.jpg")


def last_step(path: Path) -> int | None:
    """Return the step of the last whole line of metrics.jsonl; None before the first."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"])
    except (OSError, IndexError, ValueError):  # not there yet
        return None


def summarize(samples: Sequence[Sample], records: Sequence[dict[str, Any]], steps: int) -> list[Part]:
    """Sum a run up by tenths of its steps.

    Raises:
      CommandError: a tenth without a sample or a record.
    """
    train = [record for record in records if record["kind"] == "train"]
    ends = [records[0]["time"]]
    before = samples[0]
    parts = []
    for number in range(PARTS):
        seen = [sample for sample in samples if number <= sample.step * PARTS / steps < number + 1]
        logged = [record for record in train if number < record["step"] * PARTS / steps <= number + 1]
        if not seen or not logged:
            raise CommandError(f"part {number + 1} of {PARTS} of the run was not seen: take more --steps")
        ends.append(logged[-1]["time"])
        parts.append(
            Part(
                memory=statistics.median(sample.memory for sample in seen) / 2**20,
                files=min(sample.files for sample in seen),
                threads=min(sample.threads for sample in seen),
                images_per_second=statistics.median(record["images_per_second"] for record in logged),
                seconds=ends[-1] - ends[-2],
                cpu_seconds=seen[-1].cpu_seconds - before.cpu_seconds,
            )
        )
        before = seen[-1]
    return parts


def to_table(parts: Sequence[Part]) -> str:
    """Return a Markdown table."""
    lines = [
        "| part | memory, MiB | open files | threads | images/s | seconds | CPU seconds |",
        "|---" + 6 * "|---:" + "|",
    ]
    for number, part in enumerate(parts, 1):
        lines.append(
            f"| {number} of {len(parts)} | {part.memory:,.1f} | {part.files} | {part.threads}"
            f" | {part.images_per_second:,.0f} | {part.seconds:.1f} | {part.cpu_seconds:.1f} |"
        )
    return "\n".join(lines)


def find_growth(parts: Sequence[Part], limits: Limits) -> list[str]:
    """Return a line for each quantity that has grown too much after the first part."""
    first, last = parts[1], parts[-1]
    # Above the least: what the compiler used may be given back at any time, and would hide that the rest grows.
    grown = 100 * (last.memory / min(part.memory for part in parts[1:]) - 1)
    slower = 100 * (first.images_per_second / last.images_per_second - 1)
    longer = 100 * (last.seconds / first.seconds - 1)
    work = 100 * (last.cpu_seconds / first.cpu_seconds - 1)
    problems = [
        (grown > limits.memory, f"memory grew by {grown:.1f} % (limit {limits.memory:g} %)"),
        (last.files - first.files > limits.files, f"open files grew from {first.files} to {last.files}"),
        (last.threads - first.threads > limits.threads, f"threads grew from {first.threads} to {last.threads}"),
        (slower > limits.slower, f"a step takes {slower:.1f} % longer (limit {limits.slower:g} %)"),
        (longer > limits.slower, f"with evaluations, {longer:.1f} % longer (limit {limits.slower:g} %)"),
        (work > limits.slower, f"a step takes {work:.1f} % more processor time (limit {limits.slower:g} %)"),
    ]
    return [line for wrong, line in problems if wrong]


if __name__ == "__main__":
    run_command(main)
