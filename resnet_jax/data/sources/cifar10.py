"""CIFAR-10 from its official folders or archives; downloaded where there is none of them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resnet_jax.data.sources.shards import sha256_of
from resnet_jax.data.types import Dataset, Split
from resnet_jax.errors import UserError, optional, printable, reason

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = {  # of the official archives, as TensorFlow Datasets and Keras say
    "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
}

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORDS_PER_FILE = 10_000
PIXEL_BYTES = 3072  # R, G and B plane, row-major
RECORD_BYTES = 1 + PIXEL_BYTES  # the label comes first

# MD5 of the official Python files, as torchvision says. A pickle is a program, so no other is unpickled. Two files of
# one MD5 can be made together, but nobody can make a file that has the MD5 of a given one.
PICKLES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}


class _Form(NamedTuple):
    """One of the two official forms: six files, the last of them the test images."""

    folder: str
    archive: str
    files: tuple[str, ...]
    decode: Callable[[str, bytes], tuple[np.ndarray, np.ndarray]]  # name, content -> planes [N, 3072], labels [N]

    @property
    def way_out(self) -> str:
        return f"take it anew from {self.archive} ({PAGE})"


def _decode_binary(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    if len(content) != RECORDS_PER_FILE * RECORD_BYTES:
        raise ValueError(f"expected {RECORDS_PER_FILE * RECORD_BYTES:,} bytes, found {len(content):,}")
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD_BYTES)
    planes, labels = records[:, 1:], records[:, 0]
    outside = np.flatnonzero(labels >= len(CLASS_NAMES))
    if len(outside):  # a one-hot label would silently be all zeros
        raise ValueError(f"label {labels[outside[0]]} of image {outside[0]} is outside 0..9")
    return planes, labels


def _decode_pickle(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != PICKLES[name]:
        raise ValueError("is not the official file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, about arrays that were pickled in 2009
        batch = pickle.loads(content, encoding="bytes")  # noqa: S301 (of the official file alone)
    return batch[b"data"], np.array(batch[b"labels"])


BINARY = _Form(
    "cifar-10-batches-bin", "cifar-10-binary.tar.gz", tuple(f"{name}.bin" for name in PICKLES), _decode_binary
)
PYTHON = _Form("cifar-10-batches-py", "cifar-10-python.tar.gz", tuple(PICKLES), _decode_pickle)


def load_cifar10(data_dir: str | Path) -> Dataset:
    """Return CIFAR-10: 50,000 training and 10,000 test images [N, 32, 32, 3] uint8, in the official order.

    Args:
      data_dir: looked through for the official binary files or their folder, the python ones, then an archive
        of either; may be such a folder or archive itself. Without any, one is downloaded into it.

    Raises:
      UserError: a file is missing, damaged or not of CIFAR-10, or the download failed.
    """
    data_dir = Path(data_dir).expanduser()
    try:
        found = _find(data_dir)
    except OSError as error:  # a folder that may not be entered
        raise UserError(f"{data_dir}: could not be read ({reason(error)}); check --data.dir") from error
    if found is None:
        _download(data_dir)
        found = data_dir / BINARY.folder, BINARY
    path, form = found
    *train, test = _read_folder(path, form) if form else _read_archive(path)
    images = np.concatenate([split.images for split in train])
    labels = np.concatenate([split.labels for split in train])
    return Dataset(name="cifar10", train=Split(images, labels), test=test, class_names=CLASS_NAMES)


def _find(data_dir: Path) -> tuple[Path, _Form | None] | None:
    """Return the folder and its form, or an archive and None, or None where there is nothing of CIFAR-10."""
    if data_dir.is_file():
        return data_dir, None
    for form in (BINARY, PYTHON):
        if any((data_dir / name).is_file() for name in form.files):
            return data_dir, form
        if (data_dir / form.folder).is_dir():
            return data_dir / form.folder, form
    for form in (BINARY, PYTHON):
        if (data_dir / form.archive).is_file():
            return data_dir / form.archive, None
    return None


def _read_folder(folder: Path, form: _Form) -> list[Split]:
    splits = []
    for name in form.files:
        path = folder / name
        try:
            splits.append(_to_split(*form.decode(name, path.read_bytes())))
        except OSError as error:
            raise UserError(f"{path}: could not be read ({reason(error)}); {form.way_out}") from error
        except ValueError as error:
            raise UserError(f"{path}: {error}; {form.way_out}") from error
    return splits


def _read_archive(path: Path) -> list[Split]:
    """Read the files in an official archive, without unpacking it."""
    try:
        checksum = sha256_of(path)
        form = next((form for form in (BINARY, PYTHON) if SHA256[form.archive] == checksum), None)
        if form is None:
            raise UserError(f"{path}: is no official archive, or damaged; {BINARY.way_out}")
        with tarfile.open(path) as tar:
            files = {Path(member.name).name: file.read() for member in tar if (file := tar.extractfile(member))}
    except OSError as error:
        raise UserError(f"{path}: could not be read ({reason(error)}); {BINARY.way_out}") from error
    return [_to_split(*form.decode(name, files[name])) for name in form.files]


def _to_split(planes: np.ndarray, labels: np.ndarray) -> Split:
    images = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(images), labels.astype(np.int32))


def _download(data_dir: Path) -> None:
    """Download the binary archive and leave its folder in `data_dir`, or leave nothing at all."""
    pooch = optional("pooch", extra="download")
    pooch.get_logger().setLevel("WARNING")
    created = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="cifar-10-", suffix=".part", dir=data_dir) as temporary:
            is_terminal = sys.stderr.isatty()
            archive = pooch.retrieve(
                URL, f"sha256:{SHA256[BINARY.archive]}", BINARY.archive, temporary, progressbar=is_terminal
            )
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
            if not (data_dir / BINARY.folder).is_dir():  # else another process was quicker
                os.replace(Path(temporary, BINARY.folder), data_dir / BINARY.folder)
    except (OSError, ValueError, tarfile.TarError) as error:
        in_a_line = printable(reason(error))  # it may be the server's words
        raise UserError(
            f"could not download CIFAR-10 ({in_a_line}): put {BINARY.archive} from {PAGE} into {data_dir},"
            " or pass --data.dir FOLDER"
        ) from error
    finally:
        for folder in created:
            with contextlib.suppress(OSError):  # not empty, as it should be
                folder.rmdir()
