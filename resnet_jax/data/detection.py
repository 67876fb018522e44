"""Images with boxes for training and testing: what the configuration names, and batches of it on the devices."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import Any

import jax
import numpy as np

from resnet_jax.config import Config, DataConfig, check_applies
from resnet_jax.data.annotated import AnnotatedDataset, Boxed, most_objects
from resnet_jax.data.buckets import Buckets, Reader, TrainBatches, evaluation_batches, rows_of_process
from resnet_jax.data.inputs import adapt_preprocessing
from resnet_jax.data.processes import check_main_guard
from resnet_jax.data.read_ahead import Batches, ReadAheadData
from resnet_jax.data.sources.tfds_boxes import load_tfds_boxes
from resnet_jax.data.sources.voc import load_voc
from resnet_jax.data.types import Inputs, Preprocessing, check_inputs
from resnet_jax.errors import UserError
from resnet_jax.parallel.devices import round_up


def load_annotated(config: Config, data_dir: str | None = None) -> AnnotatedDataset:
    """Load the configured images with boxes.

    Args:
      config: of the run.
      data_dir: where they are now, if not where they were.

    Raises:
      UserError: what its source finds wrong.
    """
    data = config.data
    if data.name == "voc":
        return load_voc(data_dir or data.dir, data.train_sets, data.test_sets)
    usual = DataConfig()
    train = ("train", "validation") if data.train_sets == usual.train_sets else data.train_sets
    test = ("test",) if data.test_sets == usual.test_sets else data.test_sets
    return load_tfds_boxes(data.name, data_dir or data.dir, train, test)


def describe_detection(config: Config, dataset: AnnotatedDataset, trained: Preprocessing | None = None) -> Inputs:
    """Put together what a detector takes and gives; preprocessing is that of the weights which it begins with, if any.

    Raises:
      UserError: an option is not for detection, or nothing says which mean to subtract.
    """
    check_applies(config, streamed=True)
    data, detection = config.data, config.detection
    shape = (detection.shorter_side, detection.longer_side, 3)
    if trained is None:
        if data.mean is None:
            raise UserError(
                "nothing says what to subtract from the images: begin with weights (--init-from), or give --data.mean"
                " 0.485 0.456 0.406 (of ImageNet)"
            )
        trained = Preprocessing(np.asarray(data.mean, np.float32), np.asarray(data.std, np.float32))
    inputs = Inputs(shape, dataset.class_names, adapt_preprocessing(trained, shape))
    check_inputs(inputs)
    return inputs


class DetectionData(ReadAheadData):
    """Images with boxes, read and resized by worker processes; one step is one dispatch.

    Attributes:
      filled: whether all images fill their arrays.
    """

    def __init__(self, dataset: AnnotatedDataset, config: Config, *, by_image: jax.sharding.NamedSharding):
        """Take a data set; nothing is read yet.

        Raises:
          UserError: worker processes would begin anew what this one does.
        """
        if config.data.workers != 0:
            check_main_guard()
        super().__init__(dataset, by_image)
        self._config = config
        buckets = Buckets(config.detection.shorter_side, config.detection.longer_side)
        most = -(-most_objects(dataset.train) // 8) * 8
        self._readers = {name: Reader(images, buckets, most) for name, images in self.splits.items()}
        self.filled = all(buckets.filled_by(images) for images in self.splits.values())
        data = config.data
        self._training = TrainBatches(
            self._readers["train"], data.batch_size, rows_of_process(data.batch_size), data.flip, config.run.seed
        )

    def begin(self, step: int) -> tuple[Boxed]:
        self._batches = Batches(self._training.stream(step), self._config.data.workers, Boxed)
        reader, size = self._readers["train"], self._config.data.batch_size
        row = reader.nothing(0, -1, upright=self._training.upright(step))
        shape: Any = partial(jax.ShapeDtypeStruct, sharding=self._by_image)  # they stand for arrays
        return (Boxed(*(shape((size, *array.shape), array.dtype) for array in map(np.asarray, row))),)

    def train_arrays(self, count: int) -> tuple[Boxed]:
        del count  # 1
        assert self._batches is not None, "begin() comes first"  # noqa: S101 (for the type checker)
        return (self.put(next(self._batches), "train"),)

    def eval_arrays(self, split: str) -> Generator[Boxed, None, None]:
        size = round_up(self._config.data.eval_batch_size)
        stream = evaluation_batches(self._readers[split], size, rows_of_process(size))
        with Batches(stream, self._config.data.workers, Boxed) as batches:
            for batch in batches:
                yield self.put(batch, split)

    def to_eval_batch(self, arrays: Any) -> Any:
        return arrays
