"""Train a configuration: step, log, evaluate, save."""

from __future__ import annotations

import signal
import time
from collections import deque
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax import runtime
from resnet_jax.analysis.curves import plot_curves
from resnet_jax.checkpoint import Checkpoints
from resnet_jax.config import Config, RunConfig
from resnet_jax.data import Dataset
from resnet_jax.errors import DivergedError, Interrupted, UserError
from resnet_jax.experiment import Experiment, describe_inputs, load_data
from resnet_jax.logs import RunLog
from resnet_jax.metrics import Metrics
from resnet_jax.steps import StepMetrics, StepsReport
from resnet_jax.stop_signal import StopSignal
from resnet_jax.train_state import TrainState
from resnet_jax.trained import adopt_preprocessing, adopt_weights, check_same_network, load
from resnet_jax.workdir import check_classes, check_workdir, create_workdir, is_workdir, load_inputs

_RUN_AHEAD = 1  # dispatches that the host may be ahead of the device: enough to keep it busy
# So that a signal acts and the progress bar moves soon; much shorter ones cost time on a CPU (docs/performance.md).
_SECONDS_OF_A_DISPATCH = 3.0


def train(config: Config) -> Metrics:
    """Train, going on where the work directory stands, and return the metrics on the test images.

    Raises:
      UserError: a mistake in the configuration, the data or the work directory; nothing was written.
      DivergedError: NaN or infinite loss or gradient; the last good checkpoint is named.
      Interrupted: SIGINT or SIGTERM; the run is saved.
    """
    runtime.configure(config)
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
        inputs = describe_inputs(config, dataset)
        if config.run.init_from:
            trained = load(config.run.init_from)
            check_same_network(trained, config)
            inputs = inputs._replace(preprocessing=adopt_preprocessing(trained, dataset.image_shape))
    experiment = Experiment(config, inputs, num_images=len(dataset.train))
    if not resumes:
        create_workdir(workdir, config, inputs)

    try:
        checkpoints = Checkpoints(workdir, keep=config.run.keep)
        last = checkpoints.latest()
        start = last or 0
        if start > config.run.steps:
            raise UserError(f"{workdir} is at step {start} already, beyond --run.steps {config.run.steps}")
        run_log = RunLog(workdir, step=start, steps=config.run.steps)
    except OSError as error:
        raise UserError(f"cannot write the work directory {workdir}: {error}") from error
    with StopSignal() as stop, run_log as log:
        if start:
            log.say(f"{workdir}: going on after step {start}")
        if last is not None:
            state = checkpoints.restore(experiment.abstract_state(), last)
        else:
            state = experiment.initial_state()
            if config.run.init_from:
                state = adopt_weights(trained or load(config.run.init_from), state)
        return _run(config.run, workdir, dataset, experiment, state, checkpoints, log, stop)


def _run(
    config: RunConfig,
    workdir: Path,
    dataset: Dataset,
    experiment: Experiment,
    state: TrainState,
    checkpoints: Checkpoints,
    log: RunLog,
    stop: StopSignal,
) -> Metrics:
    """Step, log, evaluate, save, from `state` on; return the last metrics on the test images."""
    start = int(state.step)
    held_out = {"test": experiment.put(dataset.test)}
    if dataset.validation:
        held_out["validation"] = experiment.put(dataset.validation)
    if start == config.steps:
        return experiment.evaluate(state, held_out["test"])

    train_split = experiment.put(dataset.train)
    began = time.perf_counter()
    train_steps = experiment.train_steps.lower(state, train_split, jnp.int32(0)).compile()
    compile_seconds = round(time.perf_counter() - began, 2)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    log.start(start, parameters=parameters, compile_seconds=compile_seconds, **runtime.description())
    reports = _Reports(start, log, checkpoints, log_every=config.log_every)
    step = start
    while step < config.steps:
        save_at, evaluate_at, log_at = (
            min(step + every - step % every, config.steps)
            for every in (config.save_every, config.eval_every, config.log_every)
        )
        at_once = config.steps_per_dispatch or reports.steps_in(_SECONDS_OF_A_DISPATCH)
        count = min(at_once, experiment.most_steps, min(save_at, evaluate_at, log_at) - step)
        state, report = train_steps(state, train_split, jnp.int32(count))
        step += count
        reports.add(step, report)

        signum = stop.signum  # read once: a signal from here on acts after the next dispatch
        save_is_due = step == save_at
        evaluation_is_due = step == evaluate_at or (save_is_due and "validation" in held_out)
        if not (signum or save_is_due or evaluation_is_due):
            continue
        reports.write_all()  # first of all: what is not finite must not be saved
        results: dict[str, Metrics] = {}
        if evaluation_is_due:
            results = {kind: experiment.evaluate(state, split) for kind, split in held_out.items()}
            log.evaluations(step, results)
            plot_curves(workdir, title=workdir.name)
        validation = results.get("validation")
        if signum or save_is_due:
            checkpoints.save(state, validation_error=validation.top1_error if validation else None)
        if signum and step < config.steps:
            checkpoints.close()
            name = signal.Signals(signum).name
            raise Interrupted(f"stopped by {name} after step {step}, saved in {workdir}; run it again to go on", signum)
        reports.restart_clock()
    checkpoints.close()
    return results["test"]


class _Reports:
    """The reports of dispatches, read one dispatch late so that the device never waits for the host."""

    def __init__(self, step: int, log: RunLog, checkpoints: Checkpoints, *, log_every: int):
        self._log, self._checkpoints, self._log_every = log, checkpoints, log_every
        self._pending: deque[tuple[int, StepsReport]] = deque()
        self._window: list[StepMetrics] = []  # of the finished steps since the last log record
        self._done = step  # the last finished step
        self._seconds_per_step = float("inf")
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of all rates what went before."""
        self._window_began = self._finished_at = time.perf_counter()

    def steps_in(self, seconds: float) -> int:
        """Return how many steps take that long, as far as is known; at least 1."""
        return max(1, int(seconds / self._seconds_per_step))

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
        if step % self._log_every == 0:
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
        )
        self._window, self._window_began = [], now
