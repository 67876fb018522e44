"""What the steps of a run report: read without holding up the device, checked, and written to the log."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

import jax
import numpy as np

from resnet_jax.config import Config, RunConfig
from resnet_jax.data.types import TrainingData
from resnet_jax.errors import BrokenDataError
from resnet_jax.metrics import Metrics, StepMetrics, StepsReport
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


class Monitor:
    """The reports of dispatches, read one dispatch late so that the device never waits for the host."""

    def __init__(self, step: int, config: Config, data: TrainingData, log: Log):
        """Begin after `step`."""
        self._config, self._data, self._log = config, data, log
        self._pending: deque[tuple[int, StepsReport]] = deque()
        self._window: list[StepMetrics] = []  # of the finished steps since the last log record
        self._done = step  # the last finished step
        self._seconds_per_step = float("inf")
        self._images = self._skipped = 0  # of all steps
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what went before out of images_per_second."""
        self._window_began = self._finished_at = time.perf_counter()

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
        self._pending.append((step, report))
        while len(self._pending) > _RUN_AHEAD:
            self._finish()

    def write_all(self) -> None:
        """Wait for all dispatches and record their steps.

        Raises:
          NotFinite: the loss or the gradient of a step.
        """
        while self._pending:
            self._finish()
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

    def check_evaluations(self, results: dict[str, Metrics]) -> None:
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
            if not np.isfinite(metrics.mean_loss):
                message = f"the {split} loss is {metrics.mean_loss} after step {self._done}"
                raise NotFinite(message, known_good=self._done - 1)

    def _finish(self) -> None:
        """Wait for the oldest dispatch; write a record if it ends where one is due."""
        step, on_device = self._pending.popleft()
        report: StepsReport = jax.device_get(on_device)
        now = time.perf_counter()
        self._seconds_per_step = (now - self._finished_at) / int(report.steps)
        self._finished_at = now
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
            f"  error {last.metrics.top1_error:.1f} %  {last.metrics.images / self._seconds_per_step:,.0f} images/s",
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
        now = time.perf_counter()
        numbers = {
            "learning_rate": float(self._window[-1].learning_rate),
            "gradient_norm": float(np.mean([report.gradient_norm for report in self._window])),
            "images_per_second": round(metrics.images / (now - self._window_began), 1),
        }
        if self._data.streamed:
            numbers["skipped"] = int(sum(report.skipped for report in self._window))
        self._log.train(self._done, metrics, numbers)
        self._window, self._window_began = [], now
