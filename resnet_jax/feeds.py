"""Where a run's images come from: kept on the devices, or read while it trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.data.augment import normalize, random_lighting
from resnet_jax.data.dataset import Dataset, Split
from resnet_jax.data.encoded import AnyDataset, EncodedImages, StreamedDataset
from resnet_jax.data.pipeline import Batch, DeviceSplit, Preprocessing, make_sampler, make_take_batch
from resnet_jax.data.stream import Batches, HostBatch, Share, evaluation_batches, training_batches
from resnet_jax.data.windows import area_window, scale_window
from resnet_jax.experiment import Experiment
from resnet_jax.metrics import Metrics
from resnet_jax.steps import StepMetrics, StepsReport, make_add_evaluation, make_train_steps
from resnet_jax.train_state import TrainState
from resnet_jax.views import make_protocol

Stop = Callable[[], object]


def never() -> bool:
    """Stop never."""
    return False


class Feed(Protocol):
    """Trains and evaluates an experiment on a data set.

    Attributes:
      train_images: how many there are.
      held_out: the other splits: "test", and "validation" if there is one.
      most_steps: the most steps in one dispatch to the devices.
      streamed: whether images are read while it trains.
    """

    train_images: int
    held_out: tuple[str, ...]
    most_steps: int
    streamed: bool

    def begin(self, state: TrainState) -> None:
        """Compile what train() needs, and go to the images of the next step of `state`."""
        ...

    def train(self, state: TrainState, count: int) -> tuple[TrainState, StepsReport]:
        """Make `count` steps in one dispatch, without waiting for them; the buffers of `state` are used up."""
        ...

    def evaluate(self, state: TrainState, kind: str, stop: Stop = never) -> Metrics | None:
        """Evaluate every image of a held-out split once, single view; sums by class as NumPy arrays.

        It is given up, and None returned, if stop() becomes true, which is asked before each batch.
        """
        ...

    def unreadable(self) -> list[str]:
        """Return the images that could not be read since the last call, such as "training image n01440764/1.JPEG"."""
        ...

    def close(self) -> None:
        """End what reads images."""
        ...


def make_feed(experiment: Experiment, dataset: AnyDataset) -> Feed:
    """Make the feed that fits a data set."""
    return ResidentFeed(experiment, dataset) if isinstance(dataset, Dataset) else StreamedFeed(experiment, dataset)


class ResidentFeed:
    """Images that lie on every device: order, augmentation and many steps are one dispatch.

    Attributes:
      program: the compiled training steps, after begin().
    """

    streamed = False

    def __init__(self, experiment: Experiment, dataset: Dataset):
        """Prepare the programs; splits are copied to the devices when they are first needed."""
        self._experiment = experiment
        config, inputs = experiment.config, experiment.inputs
        splits = {"train": dataset.train, "test": dataset.test, "validation": dataset.validation}
        self._splits = {kind: split for kind, split in splits.items() if split is not None}
        self._on_devices: dict[str, DeviceSplit] = {}
        self._replicated = experiment.replicated
        self.train_images = len(dataset.train)
        self.held_out = tuple(kind for kind in self._splits if kind != "train")
        self.most_steps = config.run.steps_per_dispatch or config.run.log_every
        sampler = make_sampler(
            experiment.data_key,
            inputs.preprocessing,
            batch_size=config.data.batch_size,
            num_images=self.train_images,
            padding=config.data.padding,
            flip=config.data.flip,
            most_steps=self.most_steps,
            sharding=experiment.by_image,
        )
        train_steps = make_train_steps(experiment.train_step, sampler)
        self.program: Any = jax.jit(train_steps, donate_argnums=0, out_shardings=self._replicated)
        batch_size = config.data.eval_batch_size
        take_batch = make_take_batch(inputs.preprocessing, batch_size=batch_size, sharding=experiment.by_image)
        self._eval_batch_size = batch_size
        add_evaluation = make_add_evaluation(experiment.eval_step, take_batch)
        self._add_evaluation = jax.jit(add_evaluation, out_shardings=self._replicated)

    def begin(self, state: TrainState) -> None:
        self.program = self.program.lower(state, self._put("train"), jnp.int32(0)).compile()

    def train(self, state: TrainState, count: int) -> tuple[TrainState, StepsReport]:
        return self.program(state, self._put("train"), jnp.int32(count))

    def evaluate(self, state: TrainState, kind: str, stop: Stop = never) -> Metrics | None:
        split = self._put(kind)
        total = _zero_metrics(self._experiment)
        for number in range(-(-len(split[1]) // self._eval_batch_size)):
            if stop():
                return None
            before, total = total, self._add_evaluation(total, state, split, jnp.int32(number))
            jax.block_until_ready(before)  # so that a signal acts soon
        return jax.device_get(total)

    def unreadable(self) -> list[str]:
        return []

    def close(self) -> None:
        pass

    def _put(self, kind: str) -> DeviceSplit:
        if kind not in self._on_devices:
            split: Split = self._splits[kind]
            self._on_devices[kind] = jax.device_put((split.images, split.labels), self._replicated)
        return self._on_devices[kind]


class StreamedFeed:
    """Images that are read, decoded and cropped by worker processes; one step is one dispatch.

    Each process reads the rows of the batches that lie on its own devices.

    Attributes:
      program: the compiled training step, after begin().
    """

    most_steps = 1
    streamed = True

    def __init__(self, experiment: Experiment, dataset: StreamedDataset):
        """Prepare the programs; nothing is read yet."""
        self._experiment, self._data = experiment, experiment.config.data
        splits = {"train": dataset.train, "test": dataset.test, "validation": dataset.validation}
        self._splits: dict[str, EncodedImages] = {kind: split for kind, split in splits.items() if split is not None}
        self.train_images = len(dataset.train)
        self.held_out = tuple(kind for kind in self._splits if kind != "train")
        self._share = Share(jax.process_index(), jax.process_count())
        height, width, _ = experiment.inputs.image_shape
        self._protocol = make_protocol("single", (height, width))
        self._batches: Batches | None = None
        self._named: set[tuple[str, int]] = set()
        self._unreadable: list[str] = []
        replicated = experiment.replicated
        step = make_streamed_step(experiment)
        self.program: Any = jax.jit(step, donate_argnums=0, out_shardings=replicated)
        evaluate = partial(_add_evaluation, experiment.eval_step, experiment.inputs.preprocessing)
        self._eval_step = jax.jit(evaluate, out_shardings=replicated)

    def begin(self, state: TrainState) -> None:
        size, data = self._protocol.input_size[0], self._data
        window = scale_window(size, data.shorter_side) if data.crop == "scale" else area_window
        self._batches = training_batches(
            self._splits["train"],
            window,
            size=size,
            flip=data.flip,
            batch_size=data.batch_size,
            seed=self._experiment.config.run.seed,
            step=int(state.step),
            share=self._share,
            workers=data.workers,
        )
        rows = data.batch_size
        abstract = HostBatch(
            jax.ShapeDtypeStruct((rows, size, size, 3), jnp.uint8, sharding=self._experiment.by_image),
            *(
                jax.ShapeDtypeStruct((rows,), dtype, sharding=self._experiment.by_image)
                for dtype in (jnp.int32, jnp.int32, jnp.bool_)
            ),
        )
        self.program = self.program.lower(state, abstract).compile()

    def train(self, state: TrainState, count: int) -> tuple[TrainState, StepsReport]:
        del count  # 1
        assert self._batches is not None, "begin() comes first"
        batch = next(self._batches)
        self._note(batch, "train")
        return self.program(state, self._put(batch))

    def evaluate(self, state: TrainState, kind: str, stop: Stop = never) -> Metrics | None:
        total = _zero_metrics(self._experiment)
        batches = evaluation_batches(
            self._splits[kind],
            self._protocol,
            batch_size=self._data.eval_batch_size,
            share=self._share,
            workers=self._data.workers,
        )
        with batches:
            for batch in batches:
                if stop():
                    return None
                self._note(batch, kind)
                before, total = total, self._eval_step(total, state, self._put(batch))
                jax.block_until_ready(before)  # or batches that wait would fill the memory of a slow device
        return jax.device_get(total)

    def unreadable(self) -> list[str]:
        names, self._unreadable = self._unreadable, []
        return names

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()

    def _put(self, batch: HostBatch) -> HostBatch:
        """Lay this process's rows on its devices."""
        by_image = self._experiment.by_image
        return HostBatch(*(jax.make_array_from_process_local_data(by_image, array) for array in batch))

    def _note(self, batch: HostBatch, kind: str) -> None:
        for index in map(int, batch.broken[batch.broken >= 0]):
            if (kind, index) not in self._named:
                self._named.add((kind, index))
                name = "training" if kind == "train" else kind
                self._unreadable.append(f"{name} image {self._splits[kind].id(index)}")


def _zero_metrics(experiment: Experiment) -> Metrics:
    """Return sums of nothing, by class, on all devices."""
    zero = jax.device_put(np.zeros(len(experiment.inputs.class_names), np.float32), experiment.replicated)
    return Metrics(*(zero for _ in dataclasses.fields(Metrics)))


def make_streamed_step(experiment: Experiment) -> Any:
    """Return step(state, batch) -> (state, StepsReport) for a HostBatch that lies on the devices."""
    inputs = experiment.inputs
    mean, std = inputs.preprocessing

    def step(state: TrainState, batch: HostBatch) -> tuple[TrainState, StepsReport]:
        images = normalize(batch.images, mean, std)
        if inputs.lighting is not None:
            key = jax.random.fold_in(experiment.data_key, state.step)
            images = random_lighting(key, images, inputs.lighting / std[:, None])
        state, report = experiment.train_step(state, Batch(images, batch.labels, batch.mask))
        report = dataclasses.replace(report, skipped=jnp.sum(batch.broken >= 0).astype(jnp.float32))
        history: StepMetrics = jax.tree.map(lambda value: jnp.asarray(value)[None], report)
        return state, StepsReport(jnp.int32(1), history)

    return step


def _add_evaluation(
    eval_step: Any, preprocessing: Preprocessing, total: Metrics, state: TrainState, batch: HostBatch
) -> Metrics:
    images = normalize(batch.images, *preprocessing)
    return total + eval_step(state, Batch(images, batch.labels, batch.mask))
