"""The readers of CIFAR-10: its binary files, its pickles, its archives."""

from __future__ import annotations

import gzip
import io
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np

from reliability.fuzz import hostile, mutations
from reliability.fuzz.reader import Damaged, Files, Reader
from resnet_jax.data import Dataset, cifar10, load_dataset

_RECORDS = 3  # in a file of CIFAR-10, instead of 10,000


def _small_cifar10() -> None:
    cifar10.RECORDS_PER_FILE = _RECORDS  # the same code on files of 9 KB instead of 30 MB
    cifar10.URL = "http://127.0.0.1:1/"  # and never the network


def _cifar_arrays() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    draw = np.random.RandomState(0)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    return {
        name: (draw.randint(0, 256, (_RECORDS, 3072)).astype(np.uint8), draw.randint(0, 10, _RECORDS)) for name in names
    }


def _cifar_binary() -> Files:
    return {
        f"{name}.bin": np.column_stack([labels.astype(np.uint8), planes]).tobytes()
        for name, (planes, labels) in _cifar_arrays().items()
    }


def _cifar_python() -> Files:
    return {
        name: pickle.dumps({b"data": planes, b"labels": labels.tolist(), b"filenames": [b"a.png"]}, protocol)
        for protocol, (name, (planes, labels)) in enumerate(_cifar_arrays().items())
    }


def _cifar_archives() -> Files:
    tar = _tar({f"cifar-10-batches-bin/{name}": content for name, content in _cifar_binary().items()})
    return {"cifar-10-binary.tar.gz": gzip.compress(tar, 1, mtime=0)}


def _tar(files: Files) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def _damage_binary(rng: random.Random, files: Files) -> Damaged:
    name = rng.choice(list(files))
    return {name: mutations.one_of(mutations.damage, mutations.splice(list(files.values())))(rng, files[name])}


def _damage_pickle(rng: random.Random, files: Files) -> Damaged:
    name = rng.choice(list(files))
    content = files[name]
    match rng.randrange(6):
        case 0:
            content = rng.choice(hostile.PICKLES)
        case 1:
            return _damage_binary(rng, files)
        case 2:
            content = mutations.damage_repeatedly(rng, rng.choice(hostile.PICKLES))
        case _:  # before and behind the pixels, where the opcodes are
            at = len(content) - 120 if rng.random() < 0.5 else 0
            content = content[:at] + mutations.at_start(mutations.damage_repeatedly, 250)(rng, content[at:])
    return {name: content}


def _damage_archive(rng: random.Random, files: Files) -> Damaged:
    (name,) = files
    content = files[name]
    match rng.randrange(8):
        case 0:
            content = hostile.gzip_bomb(1 << 30)
        case 1:
            content = mutations.damage_repeatedly(rng, content)
        case _:  # in a .gz file that is whole
            tar = gzip.decompress(content)
            at = 512 * rng.randrange(len(tar) // 512)  # where headers begin
            size = rng.choice((156, 512))
            tar = tar[:at] + mutations.at_start(mutations.damage_repeatedly, size)(rng, tar[at:])
            content = gzip.compress(tar, 1, mtime=0)
    return {name: content}


def _read_cifar10(folder: Path, names: frozenset[str]) -> None:
    dataset = load_dataset("cifar10", folder)
    assert isinstance(dataset, Dataset)
    for split, count in ((dataset.train, 5 * _RECORDS), (dataset.test, _RECORDS)):
        assert (split.images.shape, split.images.dtype) == ((count, 32, 32, 3), np.uint8)
        assert (split.labels.shape, split.labels.dtype) == ((count,), np.int32)
        assert 0 <= split.labels.min() <= split.labels.max() < 10


_BINARY = ("resnet_jax.data.sources.cifar10", "resnet_jax.data.types")
_PYTHON = ("resnet_jax.data.array_pickle", *_BINARY)
CIFAR_READERS = (
    Reader("cifar10-binary", 800, _BINARY, _cifar_binary, _damage_binary, _read_cifar10, _small_cifar10),
    Reader("cifar10-python", 1500, _PYTHON, _cifar_python, _damage_pickle, _read_cifar10, _small_cifar10),
    Reader("cifar10-archive", 300, _BINARY, _cifar_archives, _damage_archive, _read_cifar10, _small_cifar10),
)
