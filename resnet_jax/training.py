"""Train a configuration: step, log, evaluate, save."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from resnet_jax import hosts, runtime
from resnet_jax.analysis.curves import plot_curves
from resnet_jax.checkpoint import Checkpoints
from resnet_jax.config import Config, HostsConfig
from resnet_jax.errors import BrokenDataError, DivergedError, Interrupted, UserError
from resnet_jax.experiment import Experiment, describe_inputs, load_data
from resnet_jax.feeds import Feed, make_feed
from resnet_jax.logs import RunLog, SilentLog
from resnet_jax.metrics import Metrics
from resnet_jax.optim import note_validation_error
from resnet_jax.steps import StepMetrics, StepsReport
from resnet_jax.stop_signal import StopSignal
from resnet_jax.train_state import TrainState
from resnet_jax.trained import Trained, adopt_weights, check_same_network, load
from resnet_jax.workdir import check_classes, check_workdir, create_workdir, is_workdir, load_inputs

_RUN_AHEAD = 1  # dispatches that the host may be ahead of the device: enough to keep it busy
# So that a signal acts and the progress bar moves soon; much shorter ones cost time on a CPU (docs/performance.md).
_SECONDS_OF_A_DISPATCH = 3.0


class _Run(NamedTuple):
    """What a run is put together from, before anything is written."""

    config: Config
    workdir: Path
    resumes: bool
    experiment: Experiment
    feed: Feed
    trained: Trained | None


def train(config: Config) -> Metrics:
    """Train, going on where the work directory stands, and return the metrics on the test images.

    Several processes train one network together, each with the same configuration but for `hosts`.

    Raises:
      UserError: a mistake in the configuration, the data or the work directory; nothing was written.
      DivergedError: NaN or infinite loss or gradient; the last good checkpoint is named.
      BrokenDataError: too many images cannot be read.
      Interrupted: SIGINT or SIGTERM; the run is saved.
    """
    runtime.configure(config)
    hosts.connect(config.hosts)
    config = dataclasses.replace(config, hosts=HostsConfig())  # where its processes run is no part of a run
    run = hosts.together(lambda: _prepare(config))
    inputs = run.experiment.inputs
    if not run.resumes:
        hosts.on_first(lambda: create_workdir(run.workdir, config, inputs))
    checkpoints, log = hosts.together(lambda: _open(run))
    with contextlib.closing(run.feed), StopSignal() as stop, log:
        last = checkpoints.latest()
        if last is not None:
            if last:
                log.say(f"{run.workdir}: going on after step {last}")
            state = checkpoints.restore(run.experiment.abstract_state(), last)
        else:
            state = run.experiment.initial_state()
            if config.run.init_from:
                state = adopt_weights(run.trained or load(config.run.init_from), state)
        return _train(run, state, checkpoints, log, stop)


def _prepare(config: Config) -> _Run:
    """Look at the work directory and the data, and build everything; nothing is written.

    Raises:
      UserError: see train().
    """
    if not config.run.workdir:
        raise UserError("--run.workdir is not set: name a folder for checkpoints and logs")
    workdir = Path(config.run.workdir)
    check_workdir(workdir, config)
    dataset = load_data(config)
    resumes = is_workdir(workdir)
    trained = None
    if resumes:
        inputs = load_inputs(workdir)
        check_classes(inputs, dataset)
    else:
        if config.run.init_from:
            trained = load(config.run.init_from)
            check_same_network(trained, config)
        inputs = describe_inputs(config, dataset, trained.config.inputs.preprocessing if trained else None)
    experiment = Experiment(config, inputs)
    return _Run(config, workdir, resumes, experiment, make_feed(experiment, dataset), trained)


def _open(run: _Run) -> tuple[Checkpoints, RunLog]:
    """Open checkpoints and logs of the work directory.

    Raises:
      UserError: it cannot be written, or is further than it should go.
    """
    config = run.config.run
    try:
        checkpoints = Checkpoints(run.workdir, keep=config.keep)
        start = checkpoints.latest() or 0
        if start > config.steps:
            raise UserError(f"{run.workdir} is at step {start} already, beyond --run.steps {config.steps}")
        if not hosts.is_first():
            return checkpoints, SilentLog()
        top5 = len(run.experiment.inputs.class_names) > 10
        return checkpoints, RunLog(run.workdir, step=start, steps=config.steps, top5=top5)
    except OSError as error:
        raise UserError(f"cannot write the work directory {run.workdir}: {error}") from error


def _train(run: _Run, state: TrainState, checkpoints: Checkpoints, log: RunLog, stop: StopSignal) -> Metrics:
    """Step, log, evaluate, save, from `state` on; return the last metrics on the test images."""
    config, feed = run.config.run, run.feed
    start = int(state.step)
    if start == config.steps:
        return feed.evaluate(state, "test")

    began = time.perf_counter()
    feed.begin(state)
    compile_seconds = round(time.perf_counter() - began, 2)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    log.start(start, parameters=parameters, compile_seconds=compile_seconds, **runtime.description())
    reports = _Reports(start, run, log, checkpoints)
    agreed = hosts.AgreedStop(stop, run.experiment.by_image, run.experiment.replicated)
    step = start
    while step < config.steps:
        save_at, evaluate_at, log_at = (
            min(step + every - step % every, config.steps)
            for every in (config.save_every, config.eval_every, config.log_every)
        )
        count = min(reports.steps_at_once(), min(save_at, evaluate_at, log_at) - step)
        state, report = feed.train(state, count)
        step += count
        reports.add(step, report)

        signum = agreed.signum()  # read once: a signal from here on acts after the next dispatch
        save_is_due = step == save_at
        evaluation_is_due = step == evaluate_at or (save_is_due and "validation" in feed.held_out)
        if not (signum or save_is_due or evaluation_is_due):
            continue
        reports.write_all()  # first of all: what is not finite must not be saved
        results: dict[str, Metrics] = {}
        if evaluation_is_due:
            results = {kind: feed.evaluate(state, kind) for kind in feed.held_out}
            log.evaluations(step, results)
            reports.name_unreadable()
            if hosts.is_first():
                plot_curves(run.workdir, title=run.workdir.name)
        validation = results.get("validation")
        if validation and run.config.optim.schedule == "plateau" and step % config.eval_every == 0:
            patience = run.config.optim.plateau_patience
            opt_state = note_validation_error(state.opt_state, validation.top1_error, patience=patience)
            state = dataclasses.replace(state, opt_state=opt_state)
        if signum or save_is_due:
            checkpoints.save(state, validation_error=validation.top1_error if validation else None)
        if signum and step < config.steps:
            checkpoints.close()
            name = signal.Signals(signum).name
            raise Interrupted(
                f"stopped by {name} after step {step}, saved in {run.workdir}; run it again to go on", signum
            )
        reports.restart_clock()
    checkpoints.close()
    return results["test"]


class _Reports:
    """The reports of dispatches, read one dispatch late so that the device never waits for the host."""

    def __init__(self, step: int, run: _Run, log: RunLog, checkpoints: Checkpoints):
        self._run, self._log, self._checkpoints = run, log, checkpoints
        self._pending: deque[tuple[int, StepsReport]] = deque()
        self._window: list[StepMetrics] = []  # of the finished steps since the last log record
        self._done = step  # the last finished step
        self._seconds_per_step = float("inf")
        self._images = self._skipped = 0  # of all steps
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of all rates what went before."""
        self._window_began = self._finished_at = time.perf_counter()

    def steps_at_once(self) -> int:
        """Return how many steps the next dispatch should make at most."""
        most = self._run.feed.most_steps
        if self._run.config.run.steps_per_dispatch or jax.process_count() > 1:  # their clocks differ
            return most
        return min(most, max(1, int(_SECONDS_OF_A_DISPATCH / self._seconds_per_step)))

    def add(self, step: int, report: StepsReport) -> None:
        """Take in the report of the dispatch that ends with `step`, and wait for the one before it.

        Raises:
          DivergedError: see write_all().
        """
        self._pending.append((step, report))
        while len(self._pending) > _RUN_AHEAD:
            self._finish()

    def write_all(self) -> None:
        """Wait for all dispatches and record their steps.

        Raises:
          DivergedError: the loss or the gradient of a step is not finite.
        """
        while self._pending:
            self._finish()
        if self._window:
            self._write()

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
        if step % self._run.config.run.log_every == 0:
            self._write()
            return
        last = self._window[-1]
        self._log.advance(
            step,
            f"rate {last.learning_rate:g}  loss {last.metrics.mean_loss:.3f}  error {last.metrics.top1_error:.1f} %"
            f"  {last.metrics.images / self._seconds_per_step:,.0f} images/s",
        )

    def _check_finite(self, report: StepMetrics) -> None:
        for name, value in (("loss", report.metrics.mean_loss), ("gradient", report.gradient_norm)):
            if not np.isfinite(value):
                self._checkpoints.close()
                good = self._checkpoints.latest()
                kept = f"the last good checkpoint is step {good}" if good else "there is no checkpoint yet"
                raise DivergedError(
                    f"the {name} is {value} at step {self._done}; {kept} in {self._checkpoints.directory};"
                    " a lower --optim.learning-rate or a warm-up may help"
                )

    def name_unreadable(self) -> None:
        """Say which images could not be read."""
        for name in self._run.feed.unreadable():
            self._log.warn(f"cannot read the {name}: left out")

    def _count_skipped(self, report: StepMetrics) -> None:
        self._images += report.metrics.images
        self._skipped += int(report.skipped)
        share, data = self._run.config.data.max_broken, self._run.config.data
        images = max(self._images, self._run.feed.train_images)  # at least an epoch
        if 100 * self._skipped > share * images:
            self.name_unreadable()
            self._checkpoints.close()
            raise BrokenDataError(
                f"{self._skipped:,} of {images:,} training images could not be read, more than --data.max-broken"
                f" {share:g} %: python -m resnet_jax data check {data.dir} lists them"
            )

    def _write(self) -> None:
        """Write one record of all finished steps since the last."""
        metrics = sum((report.metrics for report in self._window[1:]), start=self._window[0].metrics)
        now = time.perf_counter()
        self._log.train(
            self._done,
            metrics,
            learning_rate=float(self._window[-1].learning_rate),
            gradient_norm=float(np.mean([report.gradient_norm for report in self._window])),
            rate=metrics.images / (now - self._window_began),
            skipped=int(sum(report.skipped for report in self._window)) if self._run.feed.streamed else None,
        )
        self._window, self._window_began = [], now
