"""What a network takes and gives, as the configuration and the data set say."""

from __future__ import annotations

import numpy as np

from resnet_jax.config import Config, check_applies
from resnet_jax.data.annotated import AnnotatedDataset
from resnet_jax.data.small_images import into_memory
from resnet_jax.data.sources import load_dataset
from resnet_jax.data.splits import split_validation
from resnet_jax.data.tools.statistics import find_statistics
from resnet_jax.data.types import (
    AnyDataset,
    Dataset,
    Inputs,
    LabelledImages,
    Preprocessing,
    Split,
    StreamedDataset,
    check_inputs,
)
from resnet_jax.errors import UserError
from resnet_jax.parallel.devices import cores

_MOST_IMAGES = 2**31  # positions in the endless stream of images are int32 on the devices


def load_data(config: Config) -> AnyDataset:
    """Load the configured data set and split off the validation images.

    Raises:
      UserError: the data set is not there or damaged, smaller than a batch, or passed through too often.
    """
    data = config.data
    dataset = load_dataset(data.name, data.dir, upright=data.upright)
    if data.name == "folder" and isinstance(dataset, StreamedDataset):
        dataset = into_memory(dataset, data.in_memory)
    if data.validation_size:
        dataset = split_validation(dataset, data.validation_size, data.split_seed)
    if data.batch_size > len(dataset.train):
        raise UserError(
            f"a batch of {data.batch_size} is larger than the {len(dataset.train)} training images of"
            f" {dataset.name}: choose a smaller --data.batch-size"
        )
    images = config.run.steps * data.batch_size
    if isinstance(dataset, Dataset) and images >= _MOST_IMAGES:
        raise UserError(
            f"--run.steps {config.run.steps} of {data.batch_size} images are {images:,}, beyond the {_MOST_IMAGES:,}"
            " that a position in a data set kept on the devices can count"
        )
    return dataset


def describe_inputs(config: Config, dataset: AnyDataset, trained: Preprocessing | None = None) -> Inputs:
    """Put together what the network takes and gives.

    Preprocessing is that of the weights which the run begins with (`trained`), or else has the given mean, or else the
    mean image of the training images.

    Raises:
      UserError: the statistics of streamed images are needed and not there, they or others are not finite, or an option
        is not for this data.
    """
    check_applies(config, streamed=isinstance(dataset, StreamedDataset))
    data, statistics, mean_image = config.data, None, None
    mean_is_known = trained is not None or data.mean is not None
    if isinstance(dataset, StreamedDataset):
        shape = (data.image_size, data.image_size, 3)
        if data.lighting or not mean_is_known:
            workers = cores() if data.workers is None else data.workers
            statistics = find_statistics(dataset, data.dir, data.image_size, workers=workers)
            mean_image = statistics.mean
    else:
        shape = dataset.image_shape
        mean_image = None if mean_is_known else per_pixel_mean(dataset.train)
    if trained is None:
        mean = mean_image if data.mean is None else data.mean
        trained = Preprocessing(np.asarray(mean, np.float32), np.asarray(data.std, np.float32))
    lighting = data.lighting * statistics.lighting if statistics and data.lighting else None
    inputs = Inputs(shape, dataset.class_names, adapt_preprocessing(trained, shape), lighting)
    check_inputs(inputs)
    return inputs


def per_pixel_mean(split: Split) -> np.ndarray:
    """Return the mean image [H, W, C] float32 in [0, 1] (Sec. 4.2: "with the per-pixel mean subtracted")."""
    return (split.images.mean(0, dtype=np.float64) / 255).astype(np.float32)


def adapt_preprocessing(preprocessing: Preprocessing, image_shape: tuple[int, int, int]) -> Preprocessing:
    """Return what fits images (H, W, C): a mean image of another size says no more than its colour."""
    mean, std = preprocessing
    return Preprocessing(mean.mean((0, 1)) if mean.ndim == 3 and mean.shape != image_shape else mean, std)


def balanced_weights(dataset: AnyDataset) -> np.ndarray:
    """Return for each class the number of training images that it would have among equals, divided by its own.

    [num_classes] float32; the mean over the training images is 1. A class without any has weight 0.
    """
    counts = np.bincount(dataset.train.labels, minlength=len(dataset.class_names))
    return (counts.sum() / ((counts > 0).sum() * np.maximum(counts, 1)) * (counts > 0)).astype(np.float32)


def check_classes(inputs: Inputs, dataset: AnyDataset | LabelledImages | AnnotatedDataset) -> None:
    """Raise UserError if a data set has other classes than the weights."""
    numbered = tuple(map(str, range(len(dataset.class_names))))  # as imported weights have them, without names
    # Whose folders are called n01440764 and so on, and whose weights all have the same order of classes.
    of_imagenet = dataset.name == "imagenet" and len(inputs.class_names) == len(dataset.class_names) == 1000
    if inputs.class_names not in (dataset.class_names, numbered) and not of_imagenet:
        if len(inputs.class_names) != len(dataset.class_names):
            raise UserError(
                f"{dataset.name} has {len(dataset.class_names)} classes, but the weights are for"
                f" {len(inputs.class_names)}; check --data.dir"
            )
        raise UserError(
            f"{dataset.name} has the classes {', '.join(dataset.class_names)}, but the weights are for"
            f" {', '.join(inputs.class_names)}; check --data.dir"
        )
