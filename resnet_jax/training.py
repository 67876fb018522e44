"""Train a configuration: step, log, evaluate, save."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax

from resnet_jax.config import Config, HostsConfig, RunConfig
from resnet_jax.data.detection import describe_detection, load_annotated
from resnet_jax.data.inputs import check_classes, describe_inputs, load_data
from resnet_jax.data.types import Inputs
from resnet_jax.detection_trainer import DetectionTrainer
from resnet_jax.errors import (
    BrokenDataError,
    CommandError,
    DivergedError,
    Interrupted,
    LostProcessError,
    UserError,
    reason,
)
from resnet_jax.inference.load import Trained, adopt_weights, check_same_network, load
from resnet_jax.metrics import Score
from resnet_jax.optim import note_validation_error
from resnet_jax.parallel import hosts
from resnet_jax.parallel.backend import require, unused_card
from resnet_jax.parallel.devices import description
from resnet_jax.parallel.memory import TooLittleMemoryError, explained, training_remedies
from resnet_jax.parallel.signals import StopSignal
from resnet_jax.run.checkpoint import Checkpoints, read_state
from resnet_jax.run.lock import lock
from resnet_jax.run.logs import Log, RunLog
from resnet_jax.run.monitor import Monitor, NotFinite, next_event
from resnet_jax.run.saved import directory, mark_evaluated, recover, saved_steps, was_evaluated
from resnet_jax.run.workdir import check_workdir, create_workdir, is_workdir, keep_boundaries, load_inputs
from resnet_jax.steps import TrainState, finite_parts
from resnet_jax.trainer import Trainer

AnyTrainer = Trainer | DetectionTrainer
Results = dict[str, Score]  # of the held-out splits


def train(config: Config) -> Any:
    """Train, going on where the work directory stands, and return the Metrics or DetectionScore on the test images.

    Several processes train one network together, each with the same configuration but for `hosts`. On a CPU call
    parallel.devices.configure(config) before anything is computed: it makes a device of each core.

    Raises:
      UserError: a mistake in the configuration, the data or the work directory; nothing was written.
      TooLittleMemoryError: of a device; a new work directory is removed, checkpoints stay.
      DivergedError: a loss, gradient, parameter or statistic that is not finite; the last good checkpoint is named.
      BrokenDataError: too many images cannot be read.
      StorageError: the disk does not take a checkpoint or a log; complete checkpoints stay.
      LostProcessError: another process has ended.
      Interrupted: SIGINT or SIGTERM; the run is saved.
    """
    hosts.connect(config.hosts)
    require(config.run.require)
    config = dataclasses.replace(config, hosts=HostsConfig())  # where its processes run is no part of a run
    try:
        return _train_together(config)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise LostProcessError(
            f"another process has ended, or cannot be reached ({reason(error)}): run all of them again to go on after"
            f" the last checkpoint in {config.run.workdir}"
        ) from error


def _train_together(config: Config) -> Any:
    """Train as one of the processes, in a work directory that no other run has."""
    with contextlib.ExitStack() as stack:
        with hosts.all_hosts():
            workdir = check_workdir(config)
            resumes = is_workdir(workdir)
            if resumes and hosts.is_first():  # before the data are read: a second run is refused at once
                stack.enter_context(lock(workdir))
        with hosts.all_hosts():
            trainer, trained, notes = _prepare(config, workdir, resumes)
        warnings: list[str] = []
        with hosts.all_hosts():
            if hosts.is_first():
                if not resumes:
                    create_workdir(workdir, config, trainer.inputs)
                    stack.push(partial(_leave_nothing, workdir))
                    stack.enter_context(lock(workdir))
                else:
                    keep_boundaries(workdir, config)
                warnings = recover(workdir)
        with hosts.all_hosts():
            checkpoints, log = _open(config.run, workdir, trainer.inputs)
        stack.enter_context(contextlib.closing(trainer.data))
        stop = stack.enter_context(StopSignal())
        stack.enter_context(log)
        last = checkpoints.latest()
        warnings += notes
        with hosts.all_hosts():
            for warning in warnings:
                log.warn(f"warning: {warning}")
            if hosts.is_first() and (unused := unused_card()):
                log.warn(f"warning: {unused}")
            if last:
                log.say(f"{workdir}: going on after step {last}")
        if last is None:
            state = trainer.initial_state()
            if trained is not None:
                new = {"params": state.params, "batch_stats": state.batch_stats}
                state = dataclasses.replace(state, **adopt_weights(trained, new))
        else:
            state = read_state(workdir, last, trainer.abstract_state())  # recover() has verified it
        agreed = hosts.AgreedStop(stop, trainer.by_image, trainer.replicated)
        try:
            with explained("training", training_remedies(config)):
                return _train(trainer, state, checkpoints, log, agreed)
        except (NotFinite, BrokenDataError) as error:  # in all processes
            checkpoints.close()
            if isinstance(error, NotFinite):
                raise _diverged(error, workdir) from None
            raise
        except CommandError as error:
            # All are interrupted after the same step. Anything else may be of this process alone.
            error.at_once = jax.process_count() > 1 and not isinstance(error, Interrupted)
            raise


def _leave_nothing(workdir: Path, kind: object, error: object, traceback: object) -> None:
    """Remove a new work directory for whose training the memory is too small: it would refuse another batch size."""
    del kind, traceback
    if isinstance(error, TooLittleMemoryError) and not saved_steps(workdir):
        shutil.rmtree(workdir)


def _prepare(config: Config, workdir: Path, resumes: bool) -> tuple[AnyTrainer, Trained | None, list[str]]:
    """Load the data and build everything; nothing is written.

    Return also the network that a new run begins with, and what a user should know of the data.

    Raises:
      UserError: see train().
    """
    if config.detects:
        annotated = load_annotated(config)
        notes = _left_out(annotated.problems, config.data.dir)
        build: Any = partial(DetectionTrainer, dataset=annotated)
        describe: Any = partial(describe_detection, config, annotated)
        check: Any = partial(check_classes, dataset=annotated)
    else:
        dataset = load_data(config)
        notes = _untested(dataset.untested)
        build, describe = partial(Trainer, dataset=dataset), partial(describe_inputs, config, dataset)
        check = partial(check_classes, dataset=dataset)
    if resumes:
        inputs = load_inputs(workdir)
        check(inputs)
        return build(config, inputs), None, notes
    trained = load(config.run.init_from, scan_blocks=config.model.scan_blocks) if config.run.init_from else None
    if trained is not None:
        check_same_network(trained, config)
    inputs = describe(trained.origin.inputs.preprocessing if trained else None)
    return build(config, inputs), trained, notes


def _left_out(problems: tuple[str, ...], data_dir: str) -> list[str]:
    if not problems:
        return []
    more = f" and {len(problems) - 1} more left out" if len(problems) > 1 else " left out"
    return [f"{problems[0]};{more}: python -m resnet_jax data check {data_dir}"]


def _untested(classes: tuple[str, ...]) -> list[str]:
    if not classes:
        return []
    more = f" and of {len(classes) - 1} more classes" if len(classes) > 1 else ""
    return [f"there are no test images of the class {classes[0]}{more}: their errors are not measured"]


def _open(config: RunConfig, workdir: Path, inputs: Inputs) -> tuple[Checkpoints, Log]:
    """Open checkpoints and logs of the work directory.

    Raises:
      UserError: it cannot be written, or is further than it should go.
    """
    try:
        checkpoints = Checkpoints(workdir, keep=config.keep)
        start = checkpoints.latest() or 0
        if start > config.steps:
            raise UserError(f"{workdir} is at step {start} already, beyond --run.steps {config.steps}")
        if not hosts.is_first():
            return checkpoints, Log()
        return checkpoints, RunLog(
            workdir,
            step=start,
            steps=config.steps,
            num_classes=len(inputs.class_names),
            evaluated=was_evaluated(workdir, start),
            go_on_without=config.on_log_error == "continue",
        )
    except OSError as error:
        raise UserError(f"cannot write the work directory {workdir}: {error}") from error


def _train(trainer: AnyTrainer, state: TrainState, checkpoints: Checkpoints, log: Log, stop: hosts.AgreedStop) -> Any:
    """Step, log, evaluate, save, from `state` on; return the last metrics on the test images.

    Raises:
      NotFinite: a number of the run.
      BrokenDataError, StorageError, Interrupted: see train().
    """
    config, data, workdir = trainer.config.run, trainer.data, checkpoints.workdir
    step = int(state.step)
    evaluated = was_evaluated(workdir, step)
    if step == config.steps and evaluated:
        metrics = trainer.evaluate(state, "test", stop.signum)
        if metrics is None:
            raise _interrupted(workdir, step, stop)
        return metrics

    began = time.perf_counter()
    trainer.begin(state)
    compile_seconds = round(time.perf_counter() - began, 2)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    precision = trainer.config.optim.precision
    log.start(step, parameters=parameters, precision=precision, compile_seconds=compile_seconds, **description())
    monitor = Monitor(step, trainer.config, data, log)
    results: Results | None = None
    if not evaluated:  # a signal came before
        saved = state
        with monitor.paused():
            state, results = _evaluate(trainer, state, monitor, log, stop)
        if results is None:
            raise _interrupted(workdir, step, stop)
        with hosts.all_hosts():
            # What the schedule "plateau" learned is saved with a later step, if there is one.
            if hosts.is_first() and (state is saved or step == config.steps):
                mark_evaluated(workdir, step)
    finite = jax.jit(finite_parts)
    while step < config.steps:
        event = next_event(step, config, validates="validation" in data.held_out)
        signum = 0
        while step < event.step and not signum:
            count = min(monitor.steps_at_once(step), event.step - step)
            if event.save and step + count == event.step:  # after it is saved: the checkpoint before is complete
                with monitor.paused(), hosts.all_hosts():
                    checkpoints.wait()
            state, report = trainer.train(state, count)
            step += count
            monitor.add(step, report)
            signum = stop.signum()  # from here on it acts after the next dispatch, or in an evaluation

        monitor.write_all()  # first of all: what is not finite must not be saved
        with monitor.paused():
            monitor.check_state(finite(state))
            evaluation_is_due = event.evaluate and step == event.step
            results = None
            if evaluation_is_due and not signum:
                state, results = _evaluate(trainer, state, monitor, log, stop)
            evaluated = results is not None or not evaluation_is_due
            if signum or not evaluated or event.save:
                with hosts.all_hosts():  # so that a disk that is full stops all processes
                    checkpoints.wait()
                error = results["validation"].error if results and "validation" in results else None
                checkpoints.save(state, validation_error=error, evaluated=evaluated)
        if signum or not evaluated:
            break
    with hosts.all_hosts():
        checkpoints.close()
    if results is None or step < config.steps:
        raise _interrupted(workdir, step, stop)
    return results["test"]


def _evaluate(
    trainer: AnyTrainer, state: TrainState, monitor: Monitor, log: Log, stop: hosts.AgreedStop
) -> tuple[TrainState, Results | None]:
    """Evaluate and record `state`; None if a signal asks to stop, the state is as it was then."""
    config, step = trainer.config, int(state.step)
    results: Results = {}
    for split in trainer.data.held_out:
        metrics = trainer.evaluate(state, split, stop.signum)
        if metrics is None:
            return state, None
        results[split] = metrics
    monitor.check_evaluations(results)
    log.evaluations(step, results)
    monitor.name_unreadable()
    log.draw_curves()
    if "validation" in results and config.optim.schedule == "plateau" and step % config.run.eval_every == 0:
        error, patience = results["validation"].error, config.optim.plateau_patience
        opt_state = note_validation_error(state.opt_state, error, patience=patience)
        state = dataclasses.replace(state, opt_state=opt_state)
    return state, results


def _interrupted(workdir: Path, step: int, stop: hosts.AgreedStop) -> Interrupted:
    signum = stop.signum()
    name = signal.Signals(signum).name
    return Interrupted(f"stopped by {name} after step {step}, saved in {workdir}; run it again to go on", signum)


def _diverged(error: NotFinite, workdir: Path) -> DivergedError:
    """Name the last checkpoint whose next step was finite."""
    good = max((step for step in saved_steps(workdir) if step <= error.known_good), default=None)
    kept = "there is no good checkpoint yet" if good is None else f"the last good checkpoint is step {good}"
    return DivergedError(
        f"{error}; {kept} in {directory(workdir)}; a lower --optim.learning-rate or a warm-up may help"
    )
