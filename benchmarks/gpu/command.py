"""Measure on a GPU within some minutes, in pieces; what is finished is not made again by the next call."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import io
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.driver import ENVIRONMENT, ROOT, positive
from benchmarks.gpu.page import Record, render
from benchmarks.gpu.pieces import CPU, GPU, Piece, make_pieces
from benchmarks.report import describe_machine
from resnet_jax.cli.arguments import ArgumentParser
from resnet_jax.errors import UserError, reason

_SPARE_SECONDS = 5  # for the page and the end


def main(args: Sequence[str]) -> int:
    """Make piece after piece until the minutes are over; records.jsonl and gpu.md are written after each."""
    began = time.monotonic()
    options = _parse(args)
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))  # so that what was started is ended
    records = _Records(options.out, options.resume)
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ.update(ENVIRONMENT, CUDA_VISIBLE_DEVICES=gpu)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # so that no device stays held
        machine = pool.submit(describe_machine).result()
    command = shlex.join(["python", "-m", "benchmarks.gpu", *args])
    records.add({"machine": machine, "date": _now(), "command": command, "commit": _commit()})
    if machine["platform"] != "gpu":
        _say("JAX sees no GPU: everything once with a tiny network, only to show that it works")
    until = began + 60 * options.minutes - _SPARE_SECONDS
    with _checkout(options.against) as before:
        plan = GPU if machine["platform"] == "gpu" else CPU
        pieces = make_pieces(plan, options.out, options.data, options.resume, before)
        versions = {"device": machine["device"], "sources": _digest(ROOT), "against": before and _digest(before)}
        chosen = [piece for piece in pieces if piece.name.startswith(tuple(options.only.split(",")))]
        if not chosen:
            raise UserError(
                f"--only {options.only}: there is no such piece; there are {', '.join(p.name for p in pieces)}"
            )
        for piece in chosen:
            left = until - time.monotonic()
            if records.has_finished(piece, concerning := _concerning(piece, versions)):
                _say(f"{piece.name}: finished before")
            elif left < piece.seconds:
                _say(f"{piece.name}: not begun, {left:.0f} of about {piece.seconds:.0f} s left")
            else:
                _say(f"{piece.name} ({(time.monotonic() - began) / 60:.1f} minutes)")
                records.add(_made(piece, until) | {"versions": concerning})
    print((options.out / "gpu.md").read_text())
    return 0


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=positive(float), default=9.0, help="for everything (default 9)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder for the results")
    parser.add_argument("--resume", type=Path, help="--out of an earlier call, or a folder of work directories")
    parser.add_argument("--against", metavar="COMMIT|FOLDER", help="also measure another version of the package")
    parser.add_argument("--data", default="data", metavar="DIR", help="where CIFAR-10 is; default: data")
    parser.add_argument("--only", default="", help="pieces whose names begin so, separated by commas; default: all")
    options = parser.parse_args(args)
    if options.resume and not options.resume.is_dir():
        raise UserError(f"--resume {options.resume} is no folder")
    options.data = str(Path(options.data).resolve())
    try:
        (options.out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {options.out}: {error.strerror}; choose another --out") from error
    return options


class _Records:
    """records.jsonl of a folder, and gpu.md, which shows it."""

    def __init__(self, out: Path, resume: Path | None):
        """Go on with the records of the folder, or with those of an earlier call."""
        self._out, self._records = out, list[Record]()
        for folder in (out, resume):
            if folder and (folder / "records.jsonl").is_file() and not self._records:
                lines = (folder / "records.jsonl").read_text().splitlines()
                self._records = [json.loads(line) for line in lines]

    def add(self, record: Record) -> None:
        """Write all of them, so that a call that is ended in between leaves whole lines."""
        self._records.append(record)
        for name, text in (
            ("records.jsonl", "".join(json.dumps(record) + "\n" for record in self._records)),
            ("gpu.md", render(self._records)),
        ):
            (self._out / f"{name}.new").write_text(text)
            (self._out / f"{name}.new").replace(self._out / name)

    def has_finished(self, piece: Piece, versions: dict[str, Any]) -> bool:
        """Tell whether a piece was made with these versions; see _concerning()."""
        return any(
            (record.get("piece"), record.get("versions")) == (piece.name, versions) and "error" not in record["result"]
            for record in self._records
        )


def _concerning(piece: Piece, versions: dict[str, Any]) -> dict[str, Any]:
    """Leave out the versions that the piece does not depend on: a trained network stays one."""
    if piece.name.startswith("train "):
        return {}
    return {name: value for name, value in versions.items() if name != "against" or piece.name.startswith("against ")}


def _digest(folder: Path) -> str:
    """Name the sources of a checkout, with or without git."""
    digest = hashlib.sha256()
    for path in sorted(path for part in ("resnet_jax", "benchmarks") for path in (folder / part).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _made(piece: Piece, until: float) -> Record:
    """Return the record of a piece; whatever goes wrong in it is an error there, and the next one is begun."""
    began = time.monotonic()
    try:
        result = piece.make(until)
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {reason(error)}"}
    _say(f"  {result.get('error', 'finished')}")
    return {"piece": piece.name, "date": _now(), "seconds": round(time.monotonic() - began, 1), "result": result}


@contextlib.contextmanager
def _checkout(against: str | None) -> Iterator[Path | None]:
    """Give the folder of another version: as it is, or of a commit for as long as it is needed."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(against or ROOT).resolve()
        if against and not folder.is_dir():
            archive = subprocess.run(["git", "archive", against], cwd=ROOT, capture_output=True)
            if archive.returncode:
                raise UserError(f"--against {against} is neither a folder nor a commit of this repository")
            folder = Path(temporary)
            with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
                files.extractall(folder, filter="data")
        if not (folder / "resnet_jax").is_dir():
            raise UserError(f"--against {against}: there is no resnet_jax in it")
        yield folder if against else None


def _commit() -> str | None:
    """Return the commit of this checkout, with a plus sign where files differ; None without git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+"], cwd=ROOT, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return described.stdout.strip() or None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
