"""What trains and tests a detector: network, optimizer and data, and the jitted programs that run them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax

from resnet_jax.config import Config
from resnet_jax.data.annotated import AnnotatedDataset, Boxed
from resnet_jax.data.detection import DetectionData
from resnet_jax.data.types import Inputs
from resnet_jax.detection_metrics import DetectionScore, score
from resnet_jax.detection_stages import Stage, stage_of, stages
from resnet_jax.detection_steps import detection_gradients, to_batch
from resnet_jax.errors import UserError
from resnet_jax.gradients import ComputeGradients, accumulate
from resnet_jax.inference.detect import Results, make_find
from resnet_jax.inference.load import Origin, Trained
from resnet_jax.metrics import StepsReport
from resnet_jax.models.detector import SMALL_IMAGE, build_detector
from resnet_jax.models.stacking import init_variables
from resnet_jax.optim import build_optimizer, build_schedule
from resnet_jax.parallel.devices import make_shardings
from resnet_jax.parallel.memory import check_memory, explained, training_remedies
from resnet_jax.steps import TrainState, TrainStep, create_train_state, make_streamed_step


class DetectionTrainer:
    """Network, optimizer and data of a configuration; has what trainer.Trainer has."""

    def __init__(self, config: Config, inputs: Inputs, dataset: AnnotatedDataset):
        """Build everything; nothing is computed or read yet.

        Raises:
          UserError: a value that does not fit the network, the devices or the images.
        """
        devices, batch_size = jax.device_count(), config.data.batch_size
        part, group = batch_size // config.optim.accumulation_steps, config.bn_group_size
        if part % devices:
            raise UserError(
                f"{part} images (--data.batch-size / --optim.accumulation-steps) do not divide over {devices} devices:"
                f" choose a multiple of {devices}"
            )
        has_groups = config.model.family != "vgg" and not config.model.frozen_bn
        if devices > 1 and has_groups and (group is None or part % (group * devices)):
            raise UserError(
                f"a BN group must not spread over the {devices} devices: choose --model.bn-group-size 1, or"
                " --model.frozen-bn True"
            )
        self.config, self.inputs = config, inputs
        self.model = build_detector(config, len(inputs.class_names))
        self.replicated, self.by_image = make_shardings()
        self.data = DetectionData(dataset, config, by_image=self.by_image)
        key = jax.random.key(config.run.seed)
        self._init_key, _ = jax.random.split(key)
        self._step_key = jax.random.fold_in(key, 2)
        self._step = 0  # that the next one follows
        self._optimizer = self._stage_optimizer(stages(config)[0])
        self._programs: dict[tuple[Any, ...], Any] = {}  # by stage and shape
        self._find = functools.cache(self._make_find)

    def _stage_optimizer(self, stage: Stage) -> optax.GradientTransformationExtraArgs:
        """Build the optimizer of a stage, which counts its steps from 0."""
        return build_optimizer(self.config.optim, self._stage_schedule(stage), partial(stage.trainable, self.model))

    def _stage_schedule(self, stage: Stage) -> optax.Schedule:
        optim = dataclasses.replace(self.config.optim, boundaries=stage.drops)
        return build_schedule(optim, stage.end - stage.begin)

    def train_step(self, stage: Stage) -> TrainStep:
        """Return the step of a stage: (state, batch) -> (state, StepMetrics); pure, to be jitted."""
        config, schedule = self.config, self._stage_schedule(stage)
        compute: ComputeGradients = partial(
            detection_gradients,
            model=self.model,
            config=config.detection,
            filled=self.data.filled,
            losses=stage.losses,
            separate=stage.separate,
            precision=config.optim.precision,
        )
        if config.optim.accumulation_steps > 1:
            compute = accumulate(compute, config.optim.accumulation_steps, 1)
        return TrainStep(
            compute,
            self._stage_optimizer(stage),
            lambda step: schedule(step - stage.begin),
            self._step_key,
            self.by_image.mesh if jax.device_count() > 1 else None,
        )

    def _make_find(self, separate: bool) -> Any:
        trained = Trained(self.model, {}, Origin(self.config, 0, self.inputs))
        return make_find(trained, self.config.detection, filled=self.data.filled, separate=separate)

    def initial_state(self) -> TrainState:
        """Initialize parameters and optimizer on the devices."""
        variables = init_variables(self.model, self._init_key, SMALL_IMAGE)
        create = partial(create_train_state, self._optimizer)
        return jax.jit(create, out_shardings=self.replicated)(variables)

    def abstract_state(self) -> TrainState:
        """Return the shapes, dtypes and shardings of the state, for restoring a checkpoint."""

        def create(key: jax.Array) -> TrainState:
            images = jax.numpy.zeros((1, *SMALL_IMAGE))
            return create_train_state(self._optimizer, self.model.init(key, images, train=False))

        shapes = jax.eval_shape(create, jax.random.key(0))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.replicated), shapes)

    def begin(self, state: TrainState) -> None:
        """Compile the next step of `state`, and go to its images; other shapes and stages are compiled later."""
        self._step = int(state.step)
        (batch,) = self.data.begin(self._step)
        self._program(state, batch)

    def _program(self, state: TrainState, batch: Boxed) -> Any:
        """Return the compiled program of the next step."""
        stage = stage_of(self.config, self._step + 1)
        key = (stage, batch.images.shape)
        if key not in self._programs:
            preprocessing = self.inputs.preprocessing
            steps = make_streamed_step(self.train_step(stage), lambda batch, _: to_batch(batch, preprocessing))
            program: Any = jax.jit(steps, donate_argnums=0, out_shardings=self.replicated)
            self._programs[key] = program.lower(state, batch).compile()
            check_memory(self._programs[key], "a training step", training_remedies(self.config))
        return self._programs[key]

    def train(self, state: TrainState, count: int) -> tuple[TrainState, StepsReport]:
        """Make the next step after begin() without waiting for it. The buffers of `state` are used up."""
        stage = stage_of(self.config, self._step + 1)
        if 0 < self._step == stage.begin:
            state = self._begin_stage(state, stage)
        (batch,) = self.data.train_arrays(count)
        result = self._program(state, batch)(state, batch)
        self._step += 1
        return result

    def _begin_stage(self, state: TrainState, stage: Stage) -> TrainState:
        """Return the state with a new optimizer, and with new weights for the layers that begin anew."""
        initial = self.initial_state()
        params = {**state.params, **{name: initial.params[name] for name in stage.renews}}
        opt_state = jax.jit(self._stage_optimizer(stage).init, out_shardings=self.replicated)(params)
        return dataclasses.replace(state, params=params, opt_state=opt_state)

    def evaluate(
        self, state: TrainState, split: str, stop: Callable[[], object] = lambda: False
    ) -> DetectionScore | None:
        """Find the objects of every image of a held-out split; None if stop() becomes true, asked before each batch."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        remedies = [f"--data.eval-batch-size below {self.config.data.eval_batch_size}"]
        results, find = Results(), self._find(stage_of(self.config, int(state.step)).separate)
        with contextlib.closing(self.data.eval_arrays(split)) as batches, explained("an evaluation", remedies):
            for batch in batches:
                if stop():
                    return None
                results.add(batch, find(variables, batch))
        eleven_point = self.config.detection.metric == "voc07"
        return score(
            self.data.splits[split],
            self.inputs.class_names,
            results.found,
            results.proposals,
            eleven_point=eleven_point,
        )
