"""Images: where they come from, how they are augmented, and batches of them on the devices."""

from __future__ import annotations

from resnet_jax.data.sources import load_dataset, load_test_images
from resnet_jax.data.splits import split_validation
from resnet_jax.data.types import AnyDataset, Dataset, LabelledImages, Split, StreamedDataset

__all__ = [
    "AnyDataset",
    "Dataset",
    "LabelledImages",
    "Split",
    "StreamedDataset",
    "load_dataset",
    "load_test_images",
    "split_validation",
]
