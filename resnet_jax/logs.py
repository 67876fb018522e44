"""The record of a run: metrics.jsonl, TensorBoard events, and a live progress bar or plain lines."""

from __future__ import annotations

import contextlib
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from resnet_jax import files, runtime
from resnet_jax.errors import StorageError, UserError
from resnet_jax.events import EventFile
from resnet_jax.metrics import Metrics
from resnet_jax.records import is_run_record

FILE_NAME = "metrics.jsonl"


def read_records(workdir: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl in order; what is damaged is left out."""
    return [record for record in files.read_records(workdir / FILE_NAME) if is_run_record(record)]


class RunLog:
    """Write records of kind "start", "train", "validation" and "test"; a context manager.

    Every record has `kind`, `step` and `time` (seconds since 1970). "train" averages the steps since the
    record before it: `loss` in nats, `error` in %, `images`, `learning_rate`, `gradient_norm`,
    `images_per_second`; of images read from the disk also how many had to be `skipped`. "validation" and "test" have
    `loss`, `error` and `images`. All have `top5_error` in % if that is asked for.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        step: int,
        steps: int,
        top5: bool = False,
        evaluated: bool = True,
        go_on_without: bool = False,
    ):
        """Go on after `step` of `steps`: records beyond it, of a run that died later, are dropped.

        Args:
          workdir: of the run.
          step: the last one that was made.
          steps: in all.
          top5: whether to record top-5 errors.
          evaluated: whether the evaluation after `step` was made; if not, a record of it is dropped, too.
          go_on_without: whether the run goes on without a log that cannot be written.
        """
        dropped = set() if evaluated else {(kind, step) for kind in ("validation", "test")}
        records = [record for record in read_records(workdir) if record["step"] <= step]
        records = [record for record in records if (record["kind"], record["step"]) not in dropped]
        kept = "".join(json.dumps(record) + "\n" for record in records)
        with files.replacing(workdir / FILE_NAME) as partial:
            partial.write_text(kept)
        self._path = workdir / FILE_NAME
        self._file = self._path.open("ab", buffering=0)  # a file of ours: it was just replaced
        self._events = EventFile(workdir / "tensorboard", purge_step=step + 1 if step else None)
        self._go_on_without, self._given_up = go_on_without, set[str]()
        self._console = Console(highlight=False)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=steps, completed=step, status="compiling")
        self._width = len(str(steps))
        self._top5 = top5

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of a terminal that is gone, or what a full disk did not take before
            self._progress.stop()
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._events.close()

    def start(self, step: int, **description: Any) -> None:
        """Record versions, devices and what runs on them."""
        values = {**environment(), **description}
        self._write("start", step, values)
        self.say("  ".join(f"{name} {value}" for name, value in values.items()))

    def advance(self, step: int, status: str) -> None:
        """Move the progress bar and show `status` beside it; nothing where there is no terminal."""
        self._progress.update(self._task, completed=step, status=status)

    def train(
        self,
        step: int,
        metrics: Metrics,
        *,
        learning_rate: float,
        gradient_norm: float,
        rate: float,
        skipped: int | None = None,
    ) -> None:
        """Record the training steps since the last call.

        Args:
          step: the last one.
          metrics: of all of them.
          learning_rate: of the last one.
          gradient_norm: mean.
          rate: in images/s.
          skipped: images that could not be read; None where images are not read from the disk.
        """
        values = {
            **self._values(metrics),
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm,
            "images_per_second": round(rate, 1),
            **({} if skipped is None else {"skipped": skipped}),
        }
        self._write("train", step, values)
        self._progress.update(self._task, completed=step)
        self.say(
            f"step {step:{self._width}}  rate {learning_rate:g}  loss {metrics.mean_loss:.4f}"
            f"  error {metrics.top1_error:5.2f} %{self._top5_text(metrics)}  {rate:,.0f} images/s"
            + (f"  {skipped:,} unreadable images skipped" if skipped else "")
        )

    def evaluations(self, step: int, results: dict[str, Metrics]) -> None:
        """Record evaluations on the splits "validation" and "test"."""
        for kind, metrics in results.items():
            self._write(kind, step, self._values(metrics))
            self.say(
                f"step {step:{self._width}}  {kind} error {metrics.top1_error:.2f} %{self._top5_text(metrics)}"
                f"  loss {metrics.mean_loss:.4f}  ({metrics.images:,} images)"
            )

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""

        def write() -> None:
            self._console.print(line, markup=False, soft_wrap=True)
            sys.stdout.flush()

        self.attempt("the standard output", write)

    def attempt(self, name: str, write: Callable[[], object]) -> None:
        """Write a part of the record of the run; if the disk does not take it, stop or go on without that part.

        Raises:
          StorageError: it cannot be written, and the run should not go on without it.
        """
        if name in self._given_up:
            return
        try:
            write()
        except (OSError, UserError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            reason = getattr(cause, "strerror", None) or str(error)
            if not self._go_on_without:
                if isinstance(error, BrokenPipeError):  # whoever read the output has seen enough
                    raise
                raise StorageError(
                    f"cannot write {name}: {reason}; run it again when that is mended, or add --run.on-log-error"
                    " continue to go on without"
                ) from error
            self._given_up.add(name)
            print(f"warning: cannot write {name}: {reason}; going on without", file=sys.stderr)

    def _values(self, metrics: Metrics) -> dict[str, Any]:
        top5 = {"top5_error": metrics.top5_error} if self._top5 else {}
        return {"loss": metrics.mean_loss, "error": metrics.top1_error, **top5, "images": metrics.images}

    def _top5_text(self, metrics: Metrics) -> str:
        return f"  top-5 {metrics.top5_error:.2f} %" if self._top5 else ""

    def warn(self, line: str) -> None:
        """Print what a user should know of; every process does."""
        self.say(line)

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        now = round(time.time(), 3)
        line = json.dumps({"kind": kind, "step": step, "time": now, **values})
        self.attempt(str(self._path), lambda: files.append_line(self._file, line))
        if kind != "start":
            scalars = {f"{kind}/{name}": value for name, value in values.items()}
            self.attempt("TensorBoard's events", lambda: self._events.write(step, now, scalars))


class SilentLog(RunLog):
    """The log of all processes but the first: nothing is written, and only warnings are printed."""

    def __init__(self) -> None:
        pass

    def __enter__(self) -> SilentLog:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, step: int, **description: Any) -> None:
        pass

    def advance(self, step: int, status: str) -> None:
        pass

    def train(self, step: int, metrics: Metrics, **values: Any) -> None:
        pass

    def evaluations(self, step: int, results: dict[str, Metrics]) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def attempt(self, name: str, write: Callable[[], object]) -> None:
        pass

    def warn(self, line: str) -> None:
        print(f"process {jax.process_index()}: {line}", file=sys.stderr, flush=True)


def environment() -> dict[str, Any]:
    """Name versions and devices."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "platform": device.platform,
        "device": runtime.processor() if device.platform == "cpu" else device.device_kind,
        "devices": jax.device_count(),
    }
