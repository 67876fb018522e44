"""What the steps of a run report: read without holding up the device, checked, and written to the log."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from resnet_jax.config import Config, RunConfig
from resnet_jax.data.types import TrainingData
from resnet_jax.errors import BrokenDataError
from resnet_jax.metrics import Score, StepMetrics, StepsReport
from resnet_jax.parallel.devices import counts_steps
from resnet_jax.run.logs import Log

_RUN_AHEAD = 1  # dispatches that the host may be ahead of the device: enough to keep it busy
# So that a signal acts and the progress bar moves soon; much shorter ones cost time on a CPU (docs/performance.md).
_SECONDS_OF_A_DISPATCH = 3.0


class Event(NamedTuple):
    """The next step after which something is due beside the log."""

    step: int
    save: bool
    evaluate: bool


def next_event(step: int, config: RunConfig, *, validates: bool) -> Event:
    """Return what is due next after `step`.

    Args:
      step: the last one that was made.
      config: of the run.
      validates: whether there are validation images, whose error belongs to each checkpoint.
    """
    save_at, evaluate_at = (
        min(step + every - step % every, config.steps) for every in (config.save_every, config.eval_every)
    )
    at = min(save_at, evaluate_at)
    return Event(at, at == save_at, at == evaluate_at or validates)


class NotFinite(Exception):
    """A number of a run is not finite.

    Attributes:
      known_good: the last step whose next step was finite.
    """

    def __init__(self, what: str, known_good: int):
        super().__init__(what)
        self.known_good = known_good


@dataclasses.dataclass
class _Dispatch:
    """Training steps on the device, and what they took, once it is known that they are done."""

    last_step: int
    steps: int
    report: Any  # a StepsReport
    seconds: float | None = None


class Monitor:
    """The reports of dispatches, read one dispatch late so that the device never waits for the host.

    Rates are steps by the time between two moments at which the device was seen to be done with what it had, without
    what was paused(). A dispatch may return at once or when it has ended: how long the call took says nothing.
    """

    def __init__(self, step: int, config: Config, data: TrainingData, log: Log):
        """Begin after `step`."""
        self._config, self._data, self._log = config, data, log
        self._pending: deque[_Dispatch] = deque()
        self._window: list[StepMetrics] = []  # of the finished steps since the last log record
        self._window_seconds = 0.0
        self._added = self._done = step  # the last step that was dispatched, the last finished one
        self._seconds_per_step = float("inf")
        self._images = self._skipped = 0  # of all steps
        self._seen_at = time.perf_counter()  # when the device was last seen to be done

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Wait for all dispatches, and leave the time of what is done inside out of the rates."""
        self._finish_all()
        yield
        self._seen_at = time.perf_counter()

    def steps_at_once(self, step: int) -> int:
        """Return how many steps the dispatch after `step` should make at most: up to the next log record."""
        every = self._config.run.log_every
        most = min(self._data.most_steps, every - step % every)
        if self._config.run.steps_per_dispatch or counts_steps() or jax.process_count() > 1:  # their clocks differ
            return most
        return min(most, max(1, int(_SECONDS_OF_A_DISPATCH / self._seconds_per_step)))

    def add(self, step: int, report: StepsReport) -> None:
        """Take in the report of the dispatch that ends with `step`, and wait for the one before it.

        Raises:
          NotFinite: see write_all().
        """
        self._pending.append(_Dispatch(step, step - self._added, report))
        self._added = step
        self._look()
        while len(self._pending) > _RUN_AHEAD:
            self._finish()

    def write_all(self) -> None:
        """Wait for all dispatches and record their steps.

        Raises:
          NotFinite: the loss or the gradient of a step.
        """
        self._finish_all()
        if self._window:
            self._write()

    def check_state(self, finite: dict[str, jax.Array]) -> None:
        """Check what the last step has left, after write_all(): it must not be saved if it is not finite.

        Args:
          finite: whether each part of the state is; see steps.finite_parts().

        Raises:
          NotFinite: one is not.
        """
        for name, is_finite in jax.device_get(finite).items():
            if not is_finite:
                raise NotFinite(f"the {name} overflowed in step {self._done}", known_good=self._done - 1)

    def check_evaluations(self, results: Mapping[str, Score]) -> None:
        """Check evaluations of the state after the last step.

        Raises:
          BrokenDataError: not an image could be read.
          NotFinite: a loss.
        """
        for split, metrics in results.items():
            if not metrics.images:
                self.name_unreadable()
                raise BrokenDataError(
                    f"none of the {split} images can be read: python -m resnet_jax data check {self._config.data.dir}"
                )
            if not metrics.finite:
                message = f"the {split} loss is {metrics.values(0)['loss']} after step {self._done}"
                raise NotFinite(message, known_good=self._done - 1)

    def _look(self, known: _Dispatch | None = None) -> None:
        """See which dispatches are done by now: the time since the last of such moments is theirs, by their steps.

        Args:
          known: to be done, though one of several devices may not say so yet.
        """
        now = time.perf_counter()
        unseen = [dispatch for dispatch in self._pending if dispatch.seconds is None]
        done = [dispatch for dispatch in unseen if dispatch is known or dispatch.report.steps.is_ready()]
        if done:
            each = (now - self._seen_at) / sum(dispatch.steps for dispatch in done)
            for dispatch in done:
                dispatch.seconds = each * dispatch.steps
            self._seen_at = now

    def _finish_all(self) -> None:
        while self._pending:
            self._finish()

    def _finish(self) -> None:
        """Wait for the oldest dispatch; write a record if it ends where one is due."""
        dispatch = self._pending[0]
        report: StepsReport = jax.device_get(dispatch.report)
        self._look(dispatch)
        self._pending.popleft()
        step, seconds = dispatch.last_step, dispatch.seconds or 0.0
        self._seconds_per_step = max(seconds / dispatch.steps, 1e-9)  # what a clock can tell
        self._window_seconds += seconds
        for i in range(int(report.steps)):
            self._done += 1
            self._window.append(jax.tree.map(lambda entries, i=i: entries[i], report.history))
            self._check_finite(self._window[-1])
            self._count_skipped(self._window[-1])
        self.name_unreadable()
        if step % self._config.run.log_every == 0:
            self._write()
            return
        last = self._window[-1]
        self._log.advance(
            step,
            f"lr {last.learning_rate:g}  loss {last.metrics.mean_loss:.3f}"
            f"  error {float(last.metrics.batch_error):.1f} %"
            f"  {last.metrics.images / self._seconds_per_step:,.0f} images/s",
        )

    def _check_finite(self, report: StepMetrics) -> None:
        for name, value in (("loss", report.metrics.mean_loss), ("gradient", report.gradient_norm)):
            if not np.isfinite(value):
                # Computed with the parameters after the step before: a checkpoint of that one is no good either.
                raise NotFinite(f"the {name} is {value} at step {self._done}", known_good=self._done - 2)

    def name_unreadable(self) -> None:
        """Say which images could not be read."""
        for name in self._data.unreadable():
            self._log.warn(f"cannot read the {name}: left out")

    def _count_skipped(self, report: StepMetrics) -> None:
        self._images += report.metrics.images
        self._skipped += int(report.skipped)
        share, data = self._config.data.max_broken, self._config.data
        images = max(self._images, self._data.train_images)  # at least an epoch
        if 100 * self._skipped > share * images:
            self.name_unreadable()
            raise BrokenDataError(
                f"{self._skipped:,} of {images:,} training images could not be read, more than --data.max-broken"
                f" {share:g} %: python -m resnet_jax data check {data.dir} lists them"
            )

    def _write(self) -> None:
        """Write one record of all finished steps since the last."""
        metrics = sum((report.metrics for report in self._window[1:]), start=self._window[0].metrics)
        numbers = {
            "learning_rate": float(self._window[-1].learning_rate),
            "gradient_norm": float(np.mean([report.gradient_norm for report in self._window])),
            "images_per_second": round(metrics.images / max(self._window_seconds, 1e-9), 1),
        }
        if self._data.streamed:
            numbers["skipped"] = int(sum(report.skipped for report in self._window))
        self._log.train(self._done, metrics, numbers)
        self._window, self._window_seconds = [], 0.0
