"""Train a configuration: step, log, evaluate, save."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from pathlib import Path
from typing import NamedTuple

import jax

from resnet_jax import hosts, runtime
from resnet_jax.analysis.curves import plot_curves
from resnet_jax.checkpoint import Checkpoints
from resnet_jax.config import Config, HostsConfig
from resnet_jax.errors import Interrupted, UserError
from resnet_jax.experiment import Experiment, describe_inputs, load_data
from resnet_jax.feeds import Feed, make_feed
from resnet_jax.logs import RunLog, SilentLog
from resnet_jax.metrics import Metrics
from resnet_jax.optim import note_validation_error
from resnet_jax.reports import Reports
from resnet_jax.stop_signal import StopSignal
from resnet_jax.train_state import TrainState
from resnet_jax.trained import Trained, adopt_weights, check_same_network, load
from resnet_jax.workdir import check_classes, check_workdir, create_workdir, is_workdir, load_inputs


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
    reports = Reports(start, run.config, feed, log, checkpoints)
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
