"""Train a configuration: step, log, evaluate, save."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.config import Config, HostsConfig, RunConfig
from resnet_jax.data.inputs import balanced_weights, check_classes, describe_inputs, load_data
from resnet_jax.data.resident import ResidentData
from resnet_jax.data.streamed import StreamedData
from resnet_jax.data.types import AnyDataset, Dataset, Inputs, TrainingData
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
from resnet_jax.metrics import Metrics, StepsReport
from resnet_jax.models import Model, build_model, check_bn_groups, freeze_all_but
from resnet_jax.models.backend import for_this_backend
from resnet_jax.models.stacking import init_variables
from resnet_jax.optim import build_optimizer, build_schedule, note_validation_error, treats_all_alike
from resnet_jax.parallel import hosts
from resnet_jax.parallel.backend import require, unused_card
from resnet_jax.parallel.devices import compiler_options, counts_steps, description, make_shardings
from resnet_jax.parallel.memory import TooLittleMemoryError, check_memory, explained, training_remedies
from resnet_jax.parallel.signals import StopSignal
from resnet_jax.run.checkpoint import Checkpoints, read_state
from resnet_jax.run.lock import lock
from resnet_jax.run.logs import Log, RunLog
from resnet_jax.run.monitor import Monitor, NotFinite, next_event
from resnet_jax.run.saved import directory, mark_evaluated, recover, saved_steps, was_evaluated
from resnet_jax.run.workdir import check_workdir, create_workdir, is_workdir, keep_boundaries, load_inputs
from resnet_jax.steps import (
    TrainState,
    create_train_state,
    eval_step,
    finite_parts,
    make_streamed_step,
    make_train_step,
    make_train_steps,
)

_COUNTED_STEPS = 20  # in a dispatch to an accelerator: enough to keep it busy while the host reads their report
Results = dict[str, Metrics]  # of the held-out splits


def train(config: Config) -> Metrics:
    """Train, going on where the work directory stands, and return the metrics on the test images.

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


class Trainer:
    """Network, optimizer and data of a configuration, and the jitted programs that run them on all devices.

    Attributes:
      config: the configuration.
      inputs: what the network takes and gives.
      model: the network.
      train_step: (state, batch) -> (state, StepMetrics); pure, to be jitted.
      eval_step: (state, batch) -> Metrics; pure, to be jitted.
      data: batches of the data set.
      replicated: how the state lies on the devices: whole on each.
      by_image: how batches do: divided along their first axis.
      train_program: the jitted training steps; compiled after begin().
    """

    def __init__(self, config: Config, inputs: Inputs, dataset: AnyDataset):
        """Build everything; nothing is computed or read yet.

        Raises:
          UserError: a value that does not fit the network, the devices or the images.
        """
        devices = jax.device_count()
        if config.data.batch_size % devices:
            raise UserError(
                f"--data.batch-size {config.data.batch_size} does not divide over {devices} devices: choose a multiple"
                f" of {devices}"
            )
        self.config, self.inputs = config, inputs
        model = freeze_all_but(build_model(config.model, len(inputs.class_names)), config.optim.trainable)
        part, group = config.data.batch_size // config.optim.accumulation_steps, model.bn_group_size
        by_themselves = devices > 1 and group is not None and part % (group * devices) == 0  # no group is of two
        self.model: Model = for_this_backend(model, parts=1 if by_themselves else None)
        check_bn_groups(self.model, inputs.image_shape, part)
        schedule = build_schedule(config.optim, config.run.steps)
        self._optimizer = build_optimizer(config.optim, schedule, self.model.trainable)
        key = jax.random.key(config.run.seed)
        self._init_key, data_key = jax.random.split(key)
        self.replicated, self.by_image = make_shardings()
        self.train_step = make_train_step(
            self.model,
            self._optimizer,
            schedule,
            jax.random.fold_in(key, 2),
            label_smoothing=config.optim.label_smoothing,
            class_weights=balanced_weights(dataset) if config.optim.class_weights == "balanced" else None,
            accumulation_steps=config.optim.accumulation_steps,
            precision=config.optim.precision,
            mesh=self.by_image.mesh if by_themselves else None,
        )
        self.eval_step = partial(eval_step, model=self.model)
        self.data: TrainingData
        steps: Callable[..., tuple[TrainState, StepsReport]]
        if isinstance(dataset, Dataset):
            resident = self.data = ResidentData(
                dataset,
                config.data,
                inputs.preprocessing,
                data_key,
                most_steps=_most_steps(config.run),
                replicated=self.replicated,
                by_image=self.by_image,
            )
            alike = treats_all_alike(config.optim) and not config.model.frozen_bn
            steps = make_train_steps(self.train_step, resident.sampler, counted=counts_steps(), as_vectors=alike)
        else:
            streamed = self.data = StreamedData(
                dataset, config.data, inputs, data_key, seed=config.run.seed, by_image=self.by_image
            )
            steps = make_streamed_step(self.train_step, streamed.to_train_batch)
        self.train_program: Any = jax.jit(
            steps, donate_argnums=0, out_shardings=self.replicated, compiler_options=compiler_options()
        )

        def add_evaluation(total: Metrics, state: TrainState, arrays: Any) -> Metrics:
            return total + self.eval_step(state, self.data.to_eval_batch(arrays))

        self._add_evaluation = jax.jit(add_evaluation, out_shardings=self.replicated)

    def initial_state(self) -> TrainState:
        """Initialize parameters and optimizer on the devices."""
        variables = init_variables(self.model, self._init_key, self.inputs.image_shape)
        create = partial(create_train_state, self._optimizer)
        return jax.jit(create, out_shardings=self.replicated)(variables)

    def abstract_state(self) -> TrainState:
        """Return the shapes, dtypes and shardings of the state, for restoring a checkpoint."""

        def create(key: jax.Array) -> TrainState:
            images = jnp.zeros((1, *self.inputs.image_shape))
            return create_train_state(self._optimizer, self.model.init(key, images, train=False))

        shapes = jax.eval_shape(create, jax.random.key(0))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.replicated), shapes)

    def begin(self, state: TrainState) -> None:
        """Compile what train() needs, and go to the images of the next step of `state`."""
        self.train_program = self.train_program.lower(state, *self.data.begin(int(state.step))).compile()
        check_memory(self.train_program, "a training step", training_remedies(self.config))

    def train(self, state: TrainState, count: int) -> tuple[TrainState, StepsReport]:
        """Make the next `count` steps after begin() in one dispatch, data.most_steps at most, without waiting for them.

        The buffers of `state` are used up.
        """
        return self.train_program(state, *self.data.train_arrays(count))

    def evaluate(self, state: TrainState, split: str, stop: Callable[[], object] = lambda: False) -> Metrics | None:
        """Evaluate every image of a held-out split once, single view; sums by class as NumPy arrays.

        It is given up, and None returned, if stop() becomes true, which is asked before each batch.
        """
        total = jax.device_put(Metrics.zeros(len(self.inputs.class_names)), self.replicated)
        remedies = [f"--data.eval-batch-size below {self.config.data.eval_batch_size}"]
        with contextlib.closing(self.data.eval_arrays(split)) as batches, explained("an evaluation", remedies):
            for arrays in batches:
                if stop():
                    return None
                before, total = total, self._add_evaluation(total, state, arrays)
                jax.block_until_ready(before)  # so that a signal acts soon, and few batches wait for a slow device
        return jax.device_get(total)


def _most_steps(config: RunConfig) -> int:
    """Return for how many steps in a dispatch the program is made.

    A counted loop makes all of them even where something is due sooner, so it is short, and several fill the interval
    between log records.
    """
    if config.steps_per_dispatch or not counts_steps():
        return min(config.steps_per_dispatch or config.log_every, config.log_every)
    dispatches = -(-config.log_every // _COUNTED_STEPS)
    return -(-config.log_every // dispatches)


def _train_together(config: Config) -> Metrics:
    """Train as one of the processes, in a work directory that no other run has."""
    with contextlib.ExitStack() as stack:
        with hosts.all_hosts():
            workdir = check_workdir(config)
            resumes = is_workdir(workdir)
            if resumes and hosts.is_first():  # before the data are read: a second run is refused at once
                stack.enter_context(lock(workdir))
        with hosts.all_hosts():
            trainer, trained, untested = _prepare(config, workdir, resumes)
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
        if untested:
            more = f" and of {len(untested) - 1} more classes" if len(untested) > 1 else ""
            warnings.append(f"there are no test images of the class {untested[0]}{more}: their errors are not measured")
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


def _prepare(config: Config, workdir: Path, resumes: bool) -> tuple[Trainer, Trained | None, tuple[str, ...]]:
    """Load the data and build everything; nothing is written.

    Return also the network that a new run begins with, and the classes without images to test on.

    Raises:
      UserError: see train().
    """
    dataset = load_data(config)
    untested = dataset.untested
    if resumes:
        inputs = load_inputs(workdir)
        check_classes(inputs, dataset)
        return Trainer(config, inputs, dataset), None, untested
    trained = load(config.run.init_from, scan_blocks=config.model.scan_blocks) if config.run.init_from else None
    if trained is not None:
        check_same_network(trained, config)
    inputs = describe_inputs(config, dataset, trained.origin.inputs.preprocessing if trained else None)
    return Trainer(config, inputs, dataset), trained, untested


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


def _train(trainer: Trainer, state: TrainState, checkpoints: Checkpoints, log: Log, stop: hosts.AgreedStop) -> Metrics:
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
                error = results["validation"].top1_error if results and "validation" in results else None
                checkpoints.save(state, validation_error=error, evaluated=evaluated)
        if signum or not evaluated:
            break
    with hosts.all_hosts():
        checkpoints.close()
    if results is None or step < config.steps:
        raise _interrupted(workdir, step, stop)
    return results["test"]


def _evaluate(
    trainer: Trainer, state: TrainState, monitor: Monitor, log: Log, stop: hosts.AgreedStop
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
        error, patience = results["validation"].top1_error, config.optim.plateau_patience
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
