"""Train a configuration: step, log, evaluate, save."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import jax
import numpy as np

from resnet_jax.analysis.curves import plot_curves
from resnet_jax.checkpoint import Checkpoints
from resnet_jax.config import Config, RunConfig
from resnet_jax.data import Dataset
from resnet_jax.errors import DivergedError, Interrupted, UserError
from resnet_jax.experiment import Experiment, describe_inputs, load_data
from resnet_jax.logs import RunLog
from resnet_jax.metrics import Metrics
from resnet_jax.steps import StepMetrics
from resnet_jax.stop_signal import StopSignal
from resnet_jax.train_state import TrainState
from resnet_jax.trained import adopt_preprocessing, adopt_weights, check_same_network, load
from resnet_jax.workdir import check_classes, check_workdir, create_workdir, is_workdir, load_inputs

# How many steps the host may run ahead of the device: enough to keep it busy, few enough to stop promptly.
_RUN_AHEAD = 2
_SECONDS_BETWEEN_UPDATES = 0.2  # of the progress bar


def train(config: Config) -> Metrics:
    """Train, going on where the work directory stands, and return the metrics on the test images.

    Raises:
      UserError: a mistake in the configuration, the data or the work directory; nothing was written.
      DivergedError: NaN or infinite loss or gradient; the last good checkpoint is named.
      Interrupted: SIGINT or SIGTERM; the run is saved.
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
    train_step = experiment.train_step.lower(state, train_split).compile()
    compile_seconds = round(time.perf_counter() - began, 2)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    log.start(start, parameters=parameters, compile_seconds=compile_seconds)
    window = _Window(start)
    for step in range(start + 1, config.steps + 1):
        state, report = train_step(state, train_split)
        window.add(report, log)

        signum = stop.signum  # read once: a signal from here on acts after the next step
        is_last = step == config.steps
        save_is_due = is_last or step % config.save_every == 0
        evaluation_is_due = is_last or step % config.eval_every == 0 or (save_is_due and "validation" in held_out)
        if signum or save_is_due or evaluation_is_due or step % config.log_every == 0:
            window.write(log, checkpoints)  # first of all: what is not finite must not be saved
        results: dict[str, Metrics] = {}
        if evaluation_is_due:
            results = {kind: experiment.evaluate(state, split) for kind, split in held_out.items()}
            log.evaluations(step, results)
            plot_curves(workdir, title=workdir.name)
        if signum or save_is_due:
            validation = results.get("validation")
            checkpoints.save(state, validation_error=validation.top1_error if validation else None)
        if signum and not is_last:
            checkpoints.close()
            name = signal.Signals(signum).name
            raise Interrupted(f"stopped by {name} after step {step}, saved in {workdir}; run it again to go on", signum)
        if save_is_due or evaluation_is_due:
            window.restart_clock()
    checkpoints.close()
    return results["test"]


class _Window:
    """The steps since the last log record."""

    def __init__(self, step: int):
        self._step = step  # the last step of the record before
        self._reports: list[StepMetrics] = []
        self._shown = self._began = time.perf_counter()

    def add(self, report: StepMetrics, log: RunLog) -> None:
        """Take in the report of the next step and move the progress bar."""
        self._reports.append(report)
        if len(self._reports) <= _RUN_AHEAD:
            return
        done = jax.block_until_ready(self._reports[-1 - _RUN_AHEAD])
        now = time.perf_counter()
        if now - self._shown > _SECONDS_BETWEEN_UPDATES:
            self._shown = now
            finished = len(self._reports) - _RUN_AHEAD
            metrics = jax.device_get(done.metrics)
            log.advance(
                self._step + finished,
                f"rate {float(done.learning_rate):g}  loss {metrics.mean_loss:.3f}  error {metrics.top1_error:.1f} %"
                f"  {finished * metrics.images / (now - self._began):,.0f} images/s",
            )

    def write(self, log: RunLog, checkpoints: Checkpoints) -> None:
        """Write one record of all steps and begin anew.

        Raises:
          DivergedError: the loss or the gradient of a step is not finite.
        """
        reports: list[StepMetrics] = jax.device_get(self._reports)
        seconds = time.perf_counter() - self._began
        for step, report in enumerate(reports, start=self._step + 1):
            for name, value in (("loss", report.metrics.mean_loss), ("gradient", report.gradient_norm)):
                if not np.isfinite(value):
                    checkpoints.close()
                    good = checkpoints.latest()
                    kept = f"the last good checkpoint is step {good}" if good else "there is no checkpoint yet"
                    raise DivergedError(
                        f"the {name} is {value} at step {step}; {kept} in {checkpoints.directory};"
                        " a lower --optim.learning-rate or a warm-up may help"
                    )
        total = reports[0].metrics
        for report in reports[1:]:
            total = total + report.metrics
        self._step += len(reports)
        log.train(
            self._step,
            total,
            learning_rate=float(reports[-1].learning_rate),
            gradient_norm=float(np.mean([report.gradient_norm for report in reports])),
            rate=total.images / seconds,
        )
        self._reports = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of images/s what went before."""
        self._began = time.perf_counter()
