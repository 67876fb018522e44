"""Measure this package beside plain Flax and PyTorch: all peers of a case alive at once, one at work at a time."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, PEERS, Case
from benchmarks.report import describe_machine, render
from benchmarks.worker import Task, Worker
from resnet_jax.cli.arguments import ArgumentParser
from resnet_jax.errors import UserError

ROOT = Path(__file__).parents[1]
_MINUTES = {"cpu": 25.0, "gpu": 9.0}
_SECONDS = {"cpu": 1.5, "gpu": 0.5}  # of a turn
_OUT_OF_TIME = {"error": "out of time", "ms": []}

# Of the peers' processes: one GPU, which several share, and nothing compiled before.
ENVIRONMENT = {
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
}


def main(args: Sequence[str]) -> int:
    """Measure, and write bench.json and bench.md after each case."""
    began = time.monotonic()
    parser = ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=positive(float), help="for everything (default 25 on a CPU, 9 on a GPU)")
    parser.add_argument("--only", help="names of cases or peers, separated by commas; by default all of the platform")
    parser.add_argument("--rounds", type=positive(int), default=5, help="turns of each peer, at most (default 5)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", help="folder for the results")
    options = parser.parse_args(args)
    try:
        (options.out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {options.out}: {error.strerror}; choose another --out") from error
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ.update(ENVIRONMENT, CUDA_VISIBLE_DEVICES=gpu)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # so that no device stays held
        machine = pool.submit(describe_machine).result()
    cases = select([case for case in CASES if case.platform == machine["platform"]], options.only)
    measured: dict[str, Any] = {
        "machine": machine,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks", *args]),
        "seconds": _SECONDS[machine["platform"]],
        "cases": [{"case": case._asdict(), "peers": dict.fromkeys(case.peers, _OUT_OF_TIME)} for case in cases],
    }
    until = began + 60 * (options.minutes or _MINUTES[machine["platform"]])
    for case, entry in zip(cases, measured["cases"], strict=True):
        if time.monotonic() < until:
            _say(f"{case.name} ({(time.monotonic() - began) / 60:.1f} minutes)")
            rounds = min(options.rounds, case.rounds)
            entry["peers"] = measure(case, rounds, measured["seconds"], until, options.out / "logs")
        (options.out / "bench.json").write_text(json.dumps(measured, indent=2) + "\n")
        (options.out / "bench.md").write_text(render(measured))
    print(render(measured))
    return 0


def positive(number: type[int] | type[float]) -> Callable[[str], float]:
    """Return what parses an argument of this type above 0."""

    def number_above_0(text: str) -> float:
        if (value := number(text)) <= 0:
            raise argparse.ArgumentTypeError(f"must be above 0; got {text}")
        return value

    return number_above_0


def select(cases: Sequence[Case], only: str | None) -> list[Case]:
    """Return the cases named in `only`, with the peers named there; all if none is named.

    Raises:
      UserError: there is no such case or peer.
    """
    names = [name.strip() for name in only.split(",")] if only else []
    by_name = {case.name: case for case in cases}
    for name in names:
        if name not in by_name and name not in PEERS:
            raise UserError(f"--only {name}: no such case or peer; there are {', '.join([*by_name, *PEERS])}")
    peers = [name for name in names if name in PEERS] or list(PEERS)
    chosen = [by_name[name] for name in names if name in by_name] or cases
    limited = [case._replace(peers=tuple(peer for peer in case.peers if peer in peers)) for case in chosen]
    return [case for case in limited if case.peers]


def measure(
    case: Case,
    rounds: int,
    seconds: float,
    until: float,
    logs: Path,
    *,
    then: Mapping[str, Task] | None = None,
    folders: Mapping[str, Path] | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure the peers of a case in turns.

    Args:
      case: what to measure.
      rounds: turns of each peer.
      seconds: of a turn, about.
      until: when to give up what is not done, of time.monotonic().
      logs: folder for what libraries print.
      then: what else some of the peers do after the rounds.
      folders: of peers, other checkouts whose resnet_jax is measured; those get ready one after the other, so that
        no choice of an algorithm by its time is disturbed.

    Returns:
      By peer: "ms" (of a step, in each round); as far as it came, "steps" of a round, "peak_bytes", "compile_seconds",
      "settings", the results of other tasks; and "error", a word or two, if it did not come to the end.
    """
    results: dict[str, dict[str, Any]] = {peer: {"ms": []} for peer in case.peers}
    one_by_one = case.platform == "cpu" or bool(folders)  # else at the same time: hosts of GPUs have many cores
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}

        def take_reply(peer: str) -> None:
            reply = workers[peer].reply(until)
            results[peer]["ms"] += [reply.pop("ms")] if "ms" in reply else []
            results[peer].update(reply)
            if "error" in reply:
                workers.pop(peer).close()

        for peer in case.peers:
            workers[peer] = Worker(case, peer, seconds, logs / f"{case.name}.{peer}.log", (folders or {}).get(peer))
            stack.callback(workers[peer].close)
            if one_by_one:
                take_reply(peer)
        for peer in () if one_by_one else list(workers):
            take_reply(peer)
        for number in range(1, rounds + 1):
            for peer in list(workers):
                workers[peer].ask()
                take_reply(peer)
            ms = (f"{peer} {results[peer]['ms'][-1]:.4g}" for peer in workers)
            _say(f"  round {number}, ms a step: {', '.join(ms) or 'nobody is left'}")
        for peer, task in (then or {}).items():
            if peer in workers:
                workers[peer].ask(task)
                take_reply(peer)
    return results


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
