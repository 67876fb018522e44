"""The record of a run: metrics.jsonl, TensorBoard events, and a live progress bar or plain lines."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from resnet_jax import files
from resnet_jax.errors import StorageError, UserError, optional, reason
from resnet_jax.metrics import Score
from resnet_jax.parallel.devices import environment
from resnet_jax.run.records import FILE_NAME, read_records

if TYPE_CHECKING:
    from resnet_jax.run.events import EventFile

_EVENTS = "TensorBoard's events"


class Log:
    """What a run tells of itself, a context manager; this one, of all processes but the first, only prints warnings."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, step: int, **description: Any) -> None:
        """Record versions, devices and what runs on them."""

    def advance(self, step: int, status: str) -> None:
        """Move the progress bar and show `status` beside it; nothing where there is no terminal."""

    def train(self, step: int, metrics: Any, numbers: dict[str, float]) -> None:
        """Record the training steps since the last call.

        Args:
          step: the last one.
          metrics: of all of them.
          numbers: "learning_rate", "gradient_norm", "images_per_second", and "skipped" where images are read from the
            disk; see records.RunRecord.
        """

    def evaluations(self, step: int, results: Mapping[str, Score]) -> None:
        """Record evaluations on the splits "validation" and "test"."""

    def draw_curves(self) -> None:
        """Draw curves.png anew."""

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""

    def warn(self, line: str) -> None:
        """Print what a user should know of; every process does."""
        print(f"process {jax.process_index()}: {line}", file=sys.stderr, flush=True)


class RunLog(Log):
    """The log of the first process, or of the only one; records.RunRecord says what metrics.jsonl holds."""

    def __init__(
        self,
        workdir: Path,
        *,
        step: int,
        steps: int,
        num_classes: int = 10,
        evaluated: bool = True,
        go_on_without: bool = False,
    ):
        """Go on after `step` of `steps`: records beyond it, of a run that died later, are dropped.

        Args:
          workdir: of the run.
          step: the last one that was made.
          steps: in all.
          num_classes: decides which errors are recorded; see metrics.shown_errors().
          evaluated: whether the evaluation after `step` was made; if not, a record of it is dropped, too.
          go_on_without: whether the run goes on without a log that cannot be written.
        """
        dropped = set() if evaluated else {("validation", step), ("test", step)}
        records = [record for record in read_records(workdir) if record["step"] <= step]
        records = [record for record in records if (record["kind"], record["step"]) not in dropped]
        self._path = workdir / FILE_NAME
        with files.atomic_write(self._path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in records))
        self._file = self._path.open("ab", buffering=0)  # a file of ours: it was just replaced
        self._go_on_without, self._given_up = go_on_without, set[str]()
        self._notes: list[str] = []
        self._check_installed("curves.png", "matplotlib")
        self._events: EventFile | None = None
        if self._check_installed(_EVENTS, "tensorboardX"):
            from resnet_jax.run.events import EventFile

            self._events = EventFile(workdir / "tensorboard", purge_step=step + 1 if step else None)
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
        self._num_classes = num_classes
        self._workdir = workdir

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of a terminal that is gone, or what a full disk did not take before
            self._progress.stop()
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            if self._events is not None:
                self._events.close()

    def _check_installed(self, name: str, module: str) -> bool:
        """Go on without a part of the record that needs what is not installed."""
        try:
            optional(module, extra="plots")
        except UserError as error:
            self._given_up.add(name)
            self._notes.append(f"going on without {name}: {error}")
        return name not in self._given_up

    def start(self, step: int, **description: Any) -> None:
        values = {**environment(), **description}
        self._write("start", step, values)
        self.say("  ".join(f"{name} {value}" for name, value in values.items()))
        for note in self._notes:
            self.say(note)

    def advance(self, step: int, status: str) -> None:
        self._progress.update(self._task, completed=step, status=status)

    def train(self, step: int, metrics: Any, numbers: dict[str, float]) -> None:
        self._write("train", step, {**metrics.values(self._num_classes), **numbers})
        self._progress.update(self._task, completed=step)
        skipped = numbers.get("skipped")
        self.say(
            f"step {step:{self._width}}  lr {numbers['learning_rate']:g}  {metrics.words(self._num_classes)}"
            f"  {numbers['images_per_second']:,.0f} images/s"
            + (f"  {skipped:,} unreadable images skipped" if skipped else "")
        )

    def evaluations(self, step: int, results: Mapping[str, Score]) -> None:
        for split, metrics in results.items():
            self._write(split, step, metrics.values(self._num_classes))
            result = metrics.result(self._num_classes)
            self.say(f"step {step:{self._width}}  {split} {result}  ({metrics.images:,} images)")

    def draw_curves(self) -> None:
        def draw() -> None:
            from resnet_jax.run.curves import plot_curves

            plot_curves(self._workdir, title=self._workdir.name)

        self._attempt("curves.png", draw)

    def say(self, line: str) -> None:
        def write() -> None:
            self._console.print(line, markup=False, soft_wrap=True)
            sys.stdout.flush()

        self._attempt("the standard output", write)

    def _attempt(self, name: str, write: Callable[[], object]) -> None:
        """Write a part of the record of the run; if the disk does not take it, stop or go on without that part.

        Raises:
          StorageError: it cannot be written, and the run should not go on without it.
        """
        if name in self._given_up:
            return
        try:
            write()
        except (OSError, UserError) as error:
            cause = reason(error if isinstance(error, OSError) else error.__cause__ or error)
            if not self._go_on_without:
                if isinstance(error, BrokenPipeError):  # whoever read the output has seen enough
                    raise
                raise StorageError(
                    f"cannot write {name}: {cause}; run it again when that is mended, or add --run.on-log-error"
                    " continue to go on without"
                ) from error
            self._given_up.add(name)
            print(f"warning: cannot write {name}: {cause}; going on without", file=sys.stderr)

    def warn(self, line: str) -> None:
        self.say(line)

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        now = round(time.time(), 3)
        line = json.dumps({"kind": kind, "step": step, "time": now, **values})
        self._attempt(str(self._path), lambda: files.append_line(self._file, line))
        events = self._events
        if kind != "start" and events is not None:
            scalars = {f"{kind}/{name}": value for name, value in _flat(values).items() if value is not None}
            self._attempt(_EVENTS, lambda: events.write(step, now, scalars))


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give numbers by class a name each."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat
