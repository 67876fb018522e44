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
from resnet_jax.errors import Interrupted, LostProcessError, StorageError, UserError
from resnet_jax.experiment import Experiment, describe_inputs, load_data
from resnet_jax.feeds import Feed, make_feed
from resnet_jax.lock import lock
from resnet_jax.logs import RunLog, SilentLog
from resnet_jax.metrics import Metrics
from resnet_jax.optim import note_validation_error
from resnet_jax.reports import Reports
from resnet_jax.restore import read_state, recover, was_evaluated
from resnet_jax.stop_signal import StopSignal
from resnet_jax.train_state import TrainState
from resnet_jax.trained import Trained, adopt_weights, check_same_network, load
from resnet_jax.workdir import check_classes, check_workdir, create_workdir, is_workdir, load_inputs

Results = dict[str, Metrics]  # of the held-out splits


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
      DivergedError: a loss, gradient, parameter or statistic that is not finite; the last good checkpoint is named.
      BrokenDataError: too many images cannot be read.
      StorageError: the disk does not take a checkpoint or a log; complete checkpoints stay.
      LostProcessError: another process has ended.
      Interrupted: SIGINT or SIGTERM; the run is saved.
    """
    runtime.configure(config)
    hosts.connect(config.hosts)
    config = dataclasses.replace(config, hosts=HostsConfig())  # where its processes run is no part of a run
    try:
        return _train_together(config)
    except StorageError as error:
        error.at_once = jax.process_count() > 1
        raise
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).splitlines()[0]
        raise LostProcessError(
            f"another process has ended, or cannot be reached ({reason}): run all of them again to go on after the last"
            f" checkpoint in {config.run.workdir}"
        ) from error


def _train_together(config: Config) -> Metrics:
    """Train as one of the processes, in a work directory that no other run has."""
    workdir = hosts.together(lambda: _check_workdir(config))
    resumes = is_workdir(workdir)
    with contextlib.ExitStack() as stack:
        if resumes:  # before the data are read: a second run is refused at once
            hosts.on_first(lambda: stack.enter_context(lock(workdir)))
        run = hosts.together(lambda: _prepare(config, workdir, resumes))
        if not resumes:
            hosts.on_first(lambda: create_workdir(workdir, config, run.experiment.inputs))
            hosts.on_first(lambda: stack.enter_context(lock(workdir)))
        warnings: list[str] = []
        hosts.on_first(lambda: warnings.extend(recover(workdir)))
        checkpoints, log = hosts.together(lambda: _open(run))
        stack.enter_context(contextlib.closing(run.feed))
        stop = stack.enter_context(StopSignal())
        stack.enter_context(log)
        for warning in warnings:
            log.warn(f"warning: {warning}")
        last = checkpoints.latest()
        if last is not None:
            if last:
                log.say(f"{workdir}: going on after step {last}")
            state = read_state(workdir, last, run.experiment.abstract_state())  # recover() has verified it
        else:
            state = run.experiment.initial_state()
            if config.run.init_from:
                state = adopt_weights(run.trained or load(config.run.init_from), state)
        return _train(run, state, checkpoints, log, stop)


def _check_workdir(config: Config) -> Path:
    """Return the work directory if the configuration may begin or go on there.

    Raises:
      UserError: it may not.
    """
    if not config.run.workdir:
        raise UserError("--run.workdir is not set: name a folder for checkpoints and logs")
    workdir = Path(config.run.workdir)
    check_workdir(workdir, config)
    return workdir


def _prepare(config: Config, workdir: Path, resumes: bool) -> _Run:
    """Load the data and build everything; nothing is written.

    Raises:
      UserError: see train().
    """
    dataset = load_data(config)
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
        log = RunLog(
            run.workdir,
            step=start,
            steps=config.steps,
            top5=len(run.experiment.inputs.class_names) > 10,
            evaluated=was_evaluated(run.workdir, start),
            go_on_without=config.on_log_error == "continue",
        )
        return checkpoints, log
    except OSError as error:
        raise UserError(f"cannot write the work directory {run.workdir}: {error}") from error


def _train(run: _Run, state: TrainState, checkpoints: Checkpoints, log: RunLog, stop: StopSignal) -> Metrics:
    """Step, log, evaluate, save, from `state` on; return the last metrics on the test images."""
    config, feed = run.config.run, run.feed
    start = int(state.step)
    evaluated = was_evaluated(run.workdir, start)
    agreed = hosts.AgreedStop(stop, run.experiment.by_image, run.experiment.replicated)
    if start == config.steps and evaluated:
        metrics = feed.evaluate(state, "test", agreed.signum)
        if metrics is None:
            raise _interrupted(run, start, agreed)
        return metrics

    began = time.perf_counter()
    feed.begin(state)
    compile_seconds = round(time.perf_counter() - began, 2)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    log.start(start, parameters=parameters, compile_seconds=compile_seconds, **runtime.description())
    reports = Reports(start, run.config, feed, log, checkpoints)
    results: Results | None = None
    if not evaluated:  # a signal came before
        state, results = _evaluate(run, state, start, reports, log, agreed)
        if results is None:
            raise _interrupted(run, start, agreed)
    step = start
    while step < config.steps:
        save_at, evaluate_at, log_at = (
            min(step + every - step % every, config.steps)
            for every in (config.save_every, config.eval_every, config.log_every)
        )
        count = min(reports.steps_at_once(), min(save_at, evaluate_at, log_at) - step)
        if step + count == save_at:  # at each step that is saved, the checkpoint before is complete
            hosts.together(checkpoints.wait)
        state, report = feed.train(state, count)
        step += count
        reports.add(step, report)

        signum = agreed.signum()  # a signal from here on acts after the next dispatch, or in an evaluation
        save_is_due = step == save_at
        evaluation_is_due = step == evaluate_at or (save_is_due and "validation" in feed.held_out)
        if not (signum or save_is_due or evaluation_is_due):
            continue
        reports.write_all()  # first of all: what is not finite must not be saved
        reports.check_state(state)
        results = None
        if evaluation_is_due and not signum:
            state, results = _evaluate(run, state, step, reports, log, agreed)
        evaluated = not evaluation_is_due or results is not None
        if signum or save_is_due or not evaluated:
            validation = results.get("validation") if results else None
            hosts.together(checkpoints.wait)  # so that a disk that is full stops all processes
            error = validation.top1_error if validation else None
            checkpoints.save(state, validation_error=error, evaluated=evaluated)
        if signum or not evaluated:
            break
        reports.restart_clock()
    hosts.together(checkpoints.close)
    if step < config.steps or results is None:
        raise _interrupted(run, step, agreed)
    return results["test"]


def _interrupted(run: _Run, step: int, agreed: hosts.AgreedStop) -> Interrupted:
    signum = agreed.signum()
    name = signal.Signals(signum).name
    return Interrupted(f"stopped by {name} after step {step}, saved in {run.workdir}; run it again to go on", signum)


def _evaluate(
    run: _Run, state: TrainState, step: int, reports: Reports, log: RunLog, agreed: hosts.AgreedStop
) -> tuple[TrainState, Results | None]:
    """Evaluate and record the state after `step`; None if a signal asks to stop, the state is as it was then."""
    config, feed = run.config, run.feed
    results: Results = {}
    for kind in feed.held_out:
        metrics = feed.evaluate(state, kind, agreed.signum)
        if metrics is None:
            return state, None
        results[kind] = metrics
    reports.check_evaluations(results)
    log.evaluations(step, results)
    reports.name_unreadable()
    log.attempt("curves.png", lambda: plot_curves(run.workdir, title=run.workdir.name))
    if "validation" in results and config.optim.schedule == "plateau" and step % config.run.eval_every == 0:
        error, patience = results["validation"].top1_error, config.optim.plateau_patience
        opt_state = note_validation_error(state.opt_state, error, patience=patience)
        state = dataclasses.replace(state, opt_state=opt_state)
    return state, results
