"""CIFAR-10, from its official folders or archives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.data.sources.cifar import Form, Official, decode_pickle, decode_records, load_splits
from resnet_jax.data.types import Dataset, Split

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = {  # of the official archives, as TensorFlow Datasets and Keras say
    "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
}
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORDS_PER_FILE = 10_000
PICKLES = {  # MD5 of the official Python files, as torchvision says
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}


def _decode_binary(name: str, content: bytes) -> Any:
    del name
    return decode_records(content, RECORDS_PER_FILE, 1, 0, len(CLASS_NAMES))


def _decode_python(name: str, content: bytes) -> Any:
    return decode_pickle(content, PICKLES[name], b"labels")


def load_cifar10(data_dir: str | Path) -> Dataset:
    """Return CIFAR-10: 50,000 training and 10,000 test images [N, 32, 32, 3] uint8, in the official order.

    data_dir and errors: see cifar.load_splits().
    """
    forms = (
        Form(
            "cifar-10-batches-bin", "cifar-10-binary.tar.gz", tuple(f"{name}.bin" for name in PICKLES), _decode_binary
        ),
        Form("cifar-10-batches-py", "cifar-10-python.tar.gz", tuple(PICKLES), _decode_python),
    )
    *train, test = load_splits(data_dir, Official("CIFAR-10", forms, URL, SHA256))
    images = np.concatenate([split.images for split in train])
    labels = np.concatenate([split.labels for split in train])
    return Dataset(name="cifar10", train=Split(images, labels), test=test, class_names=CLASS_NAMES)
