"""What trains and tests a detector: network, optimizer and data, and the jitted programs that run them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from resnet_jax.config import Config
from resnet_jax.data.annotated import AnnotatedDataset, Boxed
from resnet_jax.data.detection import DetectionData
from resnet_jax.data.types import Inputs
from resnet_jax.detection_metrics import DetectionScore, score
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
        self.config, self.inputs, self.dataset = config, inputs, dataset
        self.model = build_detector(config, len(inputs.class_names))
        self.replicated, self.by_image = make_shardings()
        self.data = DetectionData(dataset, config, by_image=self.by_image)
        schedule = build_schedule(config.optim, config.run.steps)
        self._optimizer = build_optimizer(config.optim, schedule, self.model.trainable)
        key = jax.random.key(config.run.seed)
        self._init_key, _ = jax.random.split(key)
        compute: ComputeGradients = partial(
            detection_gradients,
            model=self.model,
            config=config.detection,
            filled=self.data.filled,
            precision=config.optim.precision,
        )
        if config.optim.accumulation_steps > 1:
            compute = accumulate(compute, config.optim.accumulation_steps, 1)
        mesh = self.by_image.mesh if devices > 1 else None
        self.train_step = TrainStep(compute, self._optimizer, schedule, jax.random.fold_in(key, 2), mesh)
        steps = make_streamed_step(self.train_step, lambda batch, _: to_batch(batch, inputs.preprocessing))
        self.train_program: Any = jax.jit(steps, donate_argnums=0, out_shardings=self.replicated)
        self._compiled: dict[tuple[int, ...], Any] = {}
        trained = Trained(self.model, {}, Origin(config, 0, inputs))
        self._find = make_find(trained, config.detection, filled=self.data.filled)

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
        """Compile the next step of `state`, and go to its images; those of the other shape are compiled later."""
        (batch,) = self.data.begin(int(state.step))
        self._program(state, batch)

    def _program(self, state: TrainState, batch: Boxed) -> Any:
        shape = batch.images.shape
        if shape not in self._compiled:
            self._compiled[shape] = self.train_program.lower(state, batch).compile()
            check_memory(self._compiled[shape], "a training step", training_remedies(self.config))
        return self._compiled[shape]

    def train(self, state: TrainState, count: int) -> tuple[TrainState, StepsReport]:
        """Make the next step after begin() without waiting for it. The buffers of `state` are used up."""
        (batch,) = self.data.train_arrays(count)
        return self._program(state, batch)(state, batch)

    def evaluate(
        self, state: TrainState, split: str, stop: Callable[[], object] = lambda: False
    ) -> DetectionScore | None:
        """Find the objects of every image of a held-out split; None if stop() becomes true, asked before each batch."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        remedies = [f"--data.eval-batch-size below {self.config.data.eval_batch_size}"]
        results = Results()
        with contextlib.closing(self.data.eval_arrays(split)) as batches, explained("an evaluation", remedies):
            for batch in batches:
                if stop():
                    return None
                results.add(batch, self._find(variables, batch))
        eleven_point = self.config.detection.metric == "voc07"
        return score(
            self.data.splits[split],
            self.inputs.class_names,
            results.found,
            results.proposals,
            eleven_point=eleven_point,
        )
