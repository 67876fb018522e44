"""Measure this package beside plain Flax and PyTorch: python -m benchmarks, from the root of the repository."""

from __future__ import annotations

import dataclasses
import datetime
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import PEERS, Case, select
from benchmarks.driver import OUT_OF_TIME, ROUND_SECONDS, run_case, seconds_to_measure
from benchmarks.end_to_end import run_starts, run_train_py
from benchmarks.process import ROOT
from benchmarks.report import render
from resnet_jax.cli.arguments import ArgumentParser, run_command
from resnet_jax.errors import UserError

_MINUTES = {"cpu": 25.0, "gpu": 9.0}
_RESERVE = 15.0  # seconds of the budget for ending the workers and for what was before the clock
_START = 15.0  # seconds that workers need to start, at least


def main(args: Sequence[str]) -> int:
    """Measure, and write bench.json and bench.md after each case."""
    began = time.monotonic()
    parser = ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--cases", help="names, separated by commas; by default all of the platform (benchmarks/cases.py)"
    )
    parser.add_argument("--peers", help=f"of {', '.join(PEERS)}; by default all")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each peer (default 5)")
    parser.add_argument("--budget", type=float, help="minutes for everything (default 25 on a CPU, 9 on a GPU)")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10 for train.py (default: made up)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", help="folder for the results")
    options = parser.parse_args(args)
    if options.rounds < 1:
        raise UserError(f"--rounds must be at least 1; got {options.rounds}")
    if options.budget is not None and options.budget <= 0:
        raise UserError(f"--budget must be above 0; got {options.budget:g}")
    if options.data is not None and not options.data.exists():
        raise UserError(f"--data {options.data}: there is no such folder")
    logs = options.out / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {options.out}: {error.strerror}; choose another --out") from error
    machine = _describe_machine()
    minutes = options.budget or _MINUTES[machine["platform"]]
    try:
        cases = select(machine["platform"], _names(options.cases), _names(options.peers))
    except ValueError as error:
        raise UserError(str(error)) from error

    run: dict[str, Any] = {
        "machine": machine,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks", *args]),
        "rounds": options.rounds,
        "budget_minutes": minutes,
        "round_seconds": ROUND_SECONDS[machine["platform"]],
        "cases": [_entry(case, _not_run(case)) for case in cases],
    }
    deadline = began + 60 * minutes - _RESERVE
    for index, case in enumerate(cases):
        if time.monotonic() + _START + seconds_to_measure(case, 1) > deadline:
            continue
        _say(f"{case.name} ({(time.monotonic() - began) / 60:.1f} of {minutes:g} minutes)")
        run["cases"][index] = _entry(case, _measure(case, options, deadline, logs))
        _write(options.out, run)
    _write(options.out, run)
    print(render(run))
    return 0


def _describe_machine() -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.machine"]
    described = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if described.returncode:
        raise UserError(f"JAX does not start: {(described.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(described.stdout.splitlines()[-1])


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _entry(case: Case, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"name": case.name, "case": dataclasses.asdict(case), "peers": results}


def _not_run(case: Case) -> dict[str, dict[str, Any]]:
    return {peer: {"status": OUT_OF_TIME, "ms": []} for peer in case.peers}


def _measure(case: Case, options: Any, deadline: float, logs: Path) -> dict[str, dict[str, Any]]:
    if case.kind == "train.py":
        return run_train_py(case, data=options.data, deadline=deadline, logs=logs)
    if case.kind == "start":
        return run_starts(case, deadline=deadline, logs=logs)
    return run_case(case, rounds=options.rounds, deadline=deadline, logs=logs, say=_say)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write(out: Path, run: dict[str, Any]) -> None:
    (out / "bench.json").write_text(json.dumps(run, indent=2) + "\n")
    (out / "bench.md").write_text(render(run))


if __name__ == "__main__":
    run_command(main)
