"""The pieces that the minutes are spent on, the most valuable first."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases import Case
from benchmarks.driver import ROOT, measure
from benchmarks.gpu import runs

_OURS = ("ours", "PyTorch", "torch.compile, CUDA graphs")
_TWICE = ("ours", "ours, again", "ours, deterministic", "ours, deterministic, again")
_BEFORE = ("ours", "ours, before")
_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped)\b")  # in the last line of pytest


class Plan(NamedTuple):
    """What is measured.

    Attributes:
      tests: files of tests/unit.
      repeated: a case whose bits are compared.
      speed: cases beside PyTorch, with a profile of ours.
      against: cases of this and of another checkout.
      configs: networks to train, names in configs/.
      train_args: of train.py for each of them.
      rounds: turns of each peer.
      turn: seconds of a turn, about.
      seconds: of a piece, about, by the first word of its name; a network has a time of its own.
      stop_seconds: before the end, when a network that is training is told to save and stop.
    """

    tests: tuple[str, ...]
    repeated: Case
    speed: tuple[Case, ...]
    against: tuple[Case, ...]
    configs: tuple[str, ...]
    train_args: tuple[str, ...]
    rounds: int
    turn: float
    seconds: dict[str, float]
    stop_seconds: float


def _training(network: str, dtype: Any = "float32", batch_size: int = 128, peers: tuple[str, ...] = _OURS) -> Case:
    return Case("gpu", network, "train", batch_size, dtype, peers)


GPU = Plan(
    tests=(
        "models/test_norm.py",
        "models/test_resnet.py",
        "models/test_precision.py",
        "test_golden.py",
        "test_steps.py",
        "test_vectors.py",
        "test_metrics.py",
        "data/test_augment.py",
        "data/test_resident.py",
    ),
    repeated=_training("resnet20", peers=_TWICE),
    speed=(
        _training("resnet20"),
        _training("resnet50", "bfloat16", 256),
        _training("resnet20", "bfloat16"),
        _training("resnet56"),
        _training("resnet110"),
        _training("resnet56", "bfloat16"),
        _training("resnet110", "bfloat16"),
    ),
    against=(
        _training("resnet20", peers=_BEFORE),
        _training("resnet50", "bfloat16", 256, _BEFORE),
        _training("resnet20", "bfloat16", peers=_BEFORE),
    ),
    # Table 6 and Fig. 6, the cheapest first; ResNet-1202 would take hours.
    configs=(
        *(f"cifar10_resnet{depth}" for depth in (20, 32, 44, 56, 110)),
        *(f"cifar10_plain{depth}" for depth in (20, 32, 44, 56)),
    ),
    train_args=("--run.eval-every", "2000", "--run.save-every", "16000", "--run.log-every", "200", "--run.keep", "1"),
    rounds=5,
    turn=0.5,
    seconds={"tests": 60, "repeated": 50, "speed": 75, "against": 60, "train": 60},
    stop_seconds=25,
)

# Without a GPU: everything once, as small as it can be, to see that it works.
_TINY = Case("cpu", "resnet8", "train", 4, "float32", ("ours", "PyTorch"))
CPU = GPU._replace(
    tests=("test_metrics.py",),
    repeated=_TINY._replace(peers=_TWICE),
    speed=(_TINY,),
    against=(_TINY._replace(peers=_BEFORE),),
    configs=("digits_resnet20",),
    train_args=(
        *("--model.depth", "8", "--model.bn-group-size", "4", "--data.batch-size", "4", "--run.steps", "40"),
        *("--run.log-every", "10", "--run.eval-every", "20", "--run.save-every", "20"),
    ),
    rounds=2,
    turn=0.02,
    seconds={"tests": 10, "repeated": 10, "speed": 10, "against": 10, "train": 10},
    stop_seconds=10,
)


class Piece(NamedTuple):
    """A part that leaves finished evidence.

    Attributes:
      name: unique; its first word says what it is.
      seconds: it is begun only if there are so many left.
      make: make(until) works until time.monotonic() at most. It returns what was found; "error" in it says why it
        is not finished, so that another call begins it again.
    """

    name: str
    seconds: float
    make: Callable[[float], dict[str, Any]]


def make_pieces(plan: Plan, out: Path, data: str, resume: Path | None, before: Path | None) -> list[Piece]:
    """Return all pieces.

    Args:
      plan: what is measured.
      out: folder for results.
      data: folder of the data set that networks are trained on.
      resume: what an earlier call left in its folder, or work directories.
      before: another checkout.
    """
    logs = out / "logs"

    def compared(case: Case, then: Any = None, folders: dict[str, Path] | None = None) -> Callable[[float], Any]:
        def make(until: float) -> dict[str, Any]:
            peers = measure(case, plan.rounds, plan.turn, until, logs, then=then, folders=folders)
            found: dict[str, Any] = {"case": case._asdict(), "peers": peers}
            if any(result.get("error") == "out of time" for result in peers.values()):
                found["error"] = "out of time"
            return found

        return make

    pieces = [
        ("tests", lambda until: _run_tests(plan.tests, until, logs)),
        (f"repeated {plan.repeated.name}", compared(plan.repeated, dict.fromkeys(_TWICE, "digests"))),
        *((f"speed {case.name}", compared(case, {"ours": "profile"})) for case in plan.speed),
    ]
    if before:
        pieces += [(f"against {case.name}", compared(case, folders={"ours, before": before})) for case in plan.against]
    for config in plan.configs:
        run = runs.Run(config, [*plan.train_args, "--data.dir", data], out, resume, plan.stop_seconds)
        pieces.append((f"train {config}", run.go_on))
    return [Piece(name, plan.seconds[name.split()[0]], make) for name, make in pieces]


def _run_tests(names: tuple[str, ...], until: float, logs: Path) -> dict[str, Any]:
    """Run the tests in a process of its own; what pytest prints is in the log."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfE", "--tb=short"]
    command += [f"tests/unit/{name}" for name in names]
    if importlib.util.find_spec("xdist") and len(names) > 1:
        command += ["--numprocesses", "6"]
    log = logs / "tests.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return {"error": "out of time"}
        finally:  # with the processes that it has started
            runs.kill(process)
    text = log.read_text(errors="replace")
    if process.returncode not in (0, 1):  # 1: some failed
        lines = text.strip().splitlines() or [""]
        return {"error": f"pytest ended with exit code {process.returncode}: {lines[-1][-300:]}"}
    counts = {f"{word}s" if word == "error" else word: int(number) for number, word in _COUNT.findall(text)}
    return {**counts, "failed_tests": re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE), "files": list(names)}
