"""A data set whose images are read, decoded and cropped by grain while it trains; batches depend on (seed, step) alone.

The position in the data is the step: nothing else has to be saved. Batches do not depend on the number of worker
processes, and the batches of all hosts together not on the number of hosts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from functools import partial
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from grain.sharding import ShardByJaxProcess, ShardOptions

from resnet_jax.config import DataConfig
from resnet_jax.data.augment import RandomWindow, area_window, normalize, random_lighting, scale_window
from resnet_jax.data.decode import BrokenImageError, decode, decode_window, open_image
from resnet_jax.data.processes import check_main_guard
from resnet_jax.data.read_ahead import Batches, ReadAheadData
from resnet_jax.data.types import Batch, EncodedImages, HostBatch, Inputs, StreamedDataset
from resnet_jax.data.views import Protocol, make_protocol, views
from resnet_jax.errors import UserError
from resnet_jax.parallel.devices import round_up

_TRIES = 100  # images in a row that may be broken


def training_batches(
    images: EncodedImages,
    window: RandomWindow,
    *,
    size: int,
    flip: bool,
    batch_size: int,
    seed: int,
    step: int,
    rows: ShardOptions | None = None,
    workers: int | None = None,
) -> Batches:
    """Return the batches of the steps `step`, step + 1, ... without end.

    The epochs form one endless stream, each a permutation of its own, cut into batches: every image comes exactly once
    an epoch, no remainder is dropped, and a batch may straddle two epochs. An image that cannot be read is replaced by
    the next one that can.

    Args:
      images: to train on.
      window: what is cropped.
      size: of the crops, in pixels.
      flip: whether images are mirrored at random.
      batch_size: over all processes.
      seed: of the order, the windows and the mirroring.
      step: of the first batch.
      rows: which part of each batch this process reads; None: that which lies on its devices.
      workers: processes; None: one a core; 0: threads of this process.
    """
    view = _TrainingView(images, window, size, flip, seed)
    stream = grain.MapDataset.range(len(images)).shuffle(seed=seed).repeat().map_with_index(view)
    return Batches(_batches(stream, batch_size, rows)[step:], workers)


def evaluation_batches(
    images: EncodedImages,
    protocol: Protocol,
    *,
    batch_size: int,
    rows: ShardOptions | None = None,
    workers: int | None = None,
) -> Batches:
    """Return batches that hold every image once, in one view; the last one is filled up with rows that do not count.

    See training_batches().
    """
    whole = -(-len(images) // batch_size) * batch_size
    stream = grain.MapDataset.range(whole).map(_TestView(images, protocol))
    return Batches(_batches(stream, batch_size, rows), workers)


def _batches(stream: grain.MapDataset, batch_size: int, rows: ShardOptions | None) -> grain.MapDataset:
    """Cut a stream of rows into batches; whole batches are what worker processes prepare."""
    rows = rows or ShardByJaxProcess()
    return stream.batch(batch_size // rows.shard_count)[rows.shard_index :: rows.shard_count]


Row = tuple[np.ndarray, np.int32, np.int32, np.bool_]  # of a HostBatch


@dataclasses.dataclass(frozen=True)
class _TrainingView:
    images: EncodedImages
    window: RandomWindow
    size: int
    flip: bool
    seed: int

    def __call__(self, position: int, index: int) -> Row:
        """Read the image `index`, at this position of the stream."""
        broken = -1
        for _ in range(_TRIES):
            try:
                image, label = self._read(position, index)
            except BrokenImageError:
                broken = index if broken < 0 else broken
                index = (index + 1) % len(self.images)
            else:
                return image, np.int32(label), np.int32(broken), np.bool_(True)
        raise UserError(f"{_TRIES} training images in a row cannot be read, from {self.images.id(broken)} on")

    def _read(self, position: int, index: int) -> tuple[np.ndarray, int]:
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, position], np.uint64)))
        data, label = self.images.read(index)
        image = open_image(data)
        window, mirrored = self.window(rng, *image.size), self.flip and rng.random() < 0.5
        return decode_window(image, window, self.size, mirrored=mirrored), label


@dataclasses.dataclass(frozen=True)
class _TestView:
    images: EncodedImages
    protocol: Protocol

    def __call__(self, index: int) -> Row:
        """Read the image `index`; nothing beyond the last."""
        broken = -1
        if index < len(self.images):
            try:
                data, label = self.images.read(index)
                (image,) = views(decode(data), self.protocol)
                return image, np.int32(label), np.int32(-1), np.bool_(True)
            except BrokenImageError:
                broken = index
        nothing = np.zeros((*self.protocol.input_size, 3), np.uint8)
        return nothing, np.int32(0), np.int32(broken), np.bool_(False)


class StreamedData(ReadAheadData):
    """Images that are read, decoded and cropped by worker processes; one step is one dispatch.

    Each process reads the rows of the batches that lie on its own devices.
    """

    def __init__(
        self,
        dataset: StreamedDataset,
        config: DataConfig,
        inputs: Inputs,
        key: jax.Array,
        *,
        seed: int,
        by_image: jax.sharding.Sharding,
    ):
        """Take a data set; nothing is read yet.

        Args:
          dataset, config, inputs: of the run.
          key: random key of the colours.
          seed: of the order, the crops and the mirroring.
          by_image: how batches lie on the devices.

        Raises:
          UserError: worker processes would begin anew what this one does.
        """
        if config.workers != 0:
            check_main_guard()
        super().__init__(dataset, by_image)
        self._config, self._inputs, self._key, self._seed = config, inputs, key, seed
        height, width, _ = inputs.image_shape
        self._protocol = make_protocol("single", (height, width))

    def begin(self, step: int) -> tuple[HostBatch]:
        config, (size, _) = self._config, self._protocol.input_size
        self._batches = training_batches(
            self.splits["train"],
            scale_window(size, config.shorter_side) if config.crop == "scale" else area_window,
            size=size,
            flip=config.flip,
            batch_size=config.batch_size,
            seed=self._seed,
            step=step,
            workers=config.workers,
        )
        shape: Any = partial(jax.ShapeDtypeStruct, sharding=self._by_image)  # they stand for arrays
        numbers, mask = (shape((config.batch_size,), dtype) for dtype in (jnp.int32, jnp.bool_))
        return (HostBatch(shape((config.batch_size, size, size, 3), jnp.uint8), numbers, numbers, mask),)

    def train_arrays(self, count: int) -> tuple[HostBatch]:
        del count  # 1
        assert self._batches is not None, "begin() comes first"  # noqa: S101 (for the type checker)
        return (self.put(next(self._batches), "train"),)

    def to_train_batch(self, batch: HostBatch, step: jax.Array) -> Batch:
        """Normalize a batch, and shift its colours, inside a jitted function."""
        mean, std = self._inputs.preprocessing
        images = normalize(batch.images, mean, std)
        if self._inputs.lighting is not None:
            images = random_lighting(jax.random.fold_in(self._key, step), images, self._inputs.lighting / std[:, None])
        return Batch(images, batch.labels, batch.mask)

    def eval_arrays(self, split: str) -> Generator[HostBatch, None, None]:
        batches = evaluation_batches(
            self.splits[split],
            self._protocol,
            batch_size=round_up(self._config.eval_batch_size),
            workers=self._config.workers,
        )
        with batches:
            for batch in batches:
                yield self.put(batch, split)

    def to_eval_batch(self, arrays: HostBatch) -> Batch:
        return Batch(normalize(arrays.images, *self._inputs.preprocessing), arrays.labels, arrays.mask)
