"""Images packed into a few large files by pack.py: read faster than a million small ones, and checked as they are."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import typing
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import typeguard
from array_record.python.array_record_module import ArrayRecordReader

from resnet_jax.array_zip import read_arrays
from resnet_jax.data.decode import BrokenImageError
from resnet_jax.data.inside import check_inside, open_regular
from resnet_jax.data.sources.names import Names
from resnet_jax.data.sources.shards import open_shard, read_record, sha256_of
from resnet_jax.data.splits import decoded_images
from resnet_jax.data.types import LabelledImages, StreamedDataset
from resnet_jax.errors import UserError
from resnet_jax.files import read_json

MANIFEST = "manifest.json"
FORMAT = "resnet_jax packed images 1"
_INDEX = {"blob": np.uint8, "offsets": np.int64, "labels": np.int32, "crc32": np.uint32}
_ALL = typeguard.CollectionCheckStrategy.ALL_ITEMS
_AGAIN = "copy it again or pack the images anew"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of images: how many, its size, and its SHA-256."""

    file: str
    images: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class PackedSplit:
    """Files of a split: its shards in order, an index of labels, names and checksums, and what was left out."""

    images: int
    shards: tuple[Shard, ...]
    index_file: str
    index_sha256: str
    skipped: tuple[tuple[str, str], ...]  # (id, why it cannot be read)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is in a folder of packed images; this file is written last.

    Attributes:
      class_names: of the labels.
      options: of the packing.
      source: SHA-256 of the names and labels that were packed, of each split.
      splits: "train" and "val".
    """

    class_names: tuple[str, ...]
    options: dict[str, Any]
    source: dict[str, str]
    splits: dict[str, PackedSplit]

    def to_json(self) -> str:
        """Return it as text."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"


def is_packed(folder: str | Path) -> bool:
    """Tell whether a folder holds packed images."""
    return (Path(folder).expanduser() / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read what is in a folder of packed images.

    Raises:
      UserError: the manifest cannot be read, or is not of this program.
    """
    path = folder / MANIFEST
    check_inside(path, folder)
    try:
        content = read_json(path)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {repr(content['format'])[:60]}, not {FORMAT!r}")
        splits = {name: _split(content["splits"][name]) for name in ("train", "val")}
        for name, hint in {"class_names": list[str], "options": dict[str, Any], "source": dict[str, str]}.items():
            typeguard.check_type(content[name], hint, collection_check_strategy=_ALL)
        return Manifest(tuple(content["class_names"]), content["options"], content["source"], splits)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, typeguard.TypeCheckError) as error:
        reason = " ".join(repr(error).split())[:300]
        raise UserError(f"{path}: not a manifest of packed images ({reason}); {_AGAIN}") from error


def _split(content: dict[str, Any]) -> PackedSplit:
    shards = tuple(Shard(**shard) for shard in content["shards"])
    skipped = tuple((id, reason) for id, reason in content["skipped"])
    split = PackedSplit(**{**content, "shards": shards, "skipped": skipped})
    for part in (split, *shards):
        for name, hint in typing.get_type_hints(type(part)).items():
            typeguard.check_type(getattr(part, name), hint, collection_check_strategy=_ALL)
    if min([split.images, *(shard.images for shard in shards)]) < 0:
        raise ValueError("a number of images below 0")
    for name in (split.index_file, *(shard.file for shard in shards)):
        os.fsencode(name)  # half a character is no name
        if Path(name).name != name or name in ("", "..") or "\0" in name:  # it would lead to another folder
            raise ValueError(f"{name!r} is no file name")
    if split.images != sum(shard.images for shard in shards):
        raise ValueError(f"the shards hold {sum(shard.images for shard in shards)} images, not {split.images}")
    return split


class PackedImages:
    """Packed images and their labels: EncodedImages. Each process opens the files when it first reads from them."""

    def __init__(self, folder: Path, shards: tuple[Shard, ...], names: Names, labels: np.ndarray, crc32: np.ndarray):
        """Take the shards in order and, of all images in order, names, labels (int32) and checksums (uint32)."""
        self.labels = labels
        self._folder, self._shards, self._names, self._crc32 = folder, shards, names, crc32
        self._ends = np.cumsum([shard.images for shard in shards])
        self._open()

    def __len__(self) -> int:
        return len(self.labels)

    def id(self, index: int) -> str:
        """Return the path that the image had below the folder of its split."""
        return self._names.text(index)

    def read(self, index: int) -> tuple[bytes, int]:
        """Return an image's content and its label.

        Raises:
          BrokenImageError: its file cannot be read, or is damaged there.
        """
        shard = int(np.searchsorted(self._ends, index, side="right"))
        position = index - int(self._ends[shard]) + self._shards[shard].images
        try:
            content = read_record(self._reader(shard), position)
        except UserError as error:
            raise BrokenImageError(str(error)) from error
        if zlib.crc32(content) != self._crc32[index]:
            raise BrokenImageError(
                f"its checksum is wrong: {self._shards[shard].file} is damaged or of another packing"
            )
        return content, int(self.labels[index])

    def _open(self) -> None:
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def _reader(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            if shard not in self._readers:
                path = self._folder / self._shards[shard].file
                self._readers[shard] = open_shard(path, self._shards[shard].images)
            return self._readers[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()


def open_split(folder: Path, manifest: Manifest, name: str) -> PackedImages:
    """Open the split "train" or "val", and check that all its files are there, complete as far as a look at them tells.

    Raises:
      UserError: a file is missing, cut short, or not the one of the manifest.
    """
    split = manifest.splits[name]
    for shard in split.shards:
        path = folder / shard.file
        check_inside(path, folder)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path}: {MANIFEST} lists it, but {error.strerror}; {_AGAIN}") from error
        if size != shard.bytes:
            raise UserError(f"{path}: {size} bytes, but {MANIFEST} says {shard.bytes}; {_AGAIN}")
        open_shard(path, shard.images).close()
    names, labels, crc32 = _read_index(folder, split, len(manifest.class_names))
    return PackedImages(folder, split.shards, names, labels, crc32)


def _read_index(folder: Path, split: PackedSplit, num_classes: int) -> tuple[Names, np.ndarray, np.ndarray]:
    path = folder / split.index_file
    check_inside(path, folder)
    try:
        if sha256_of(path) != split.index_sha256:
            raise UserError(f"{path}: its SHA-256 is not that of {MANIFEST}; {_AGAIN}")
        with open_regular(path) as file:
            arrays = read_arrays(file, _INDEX)
        for name, dtype in _INDEX.items():
            if arrays[name].dtype != dtype or arrays[name].ndim != 1:
                raise ValueError(f"{name} is {arrays[name].dtype} {arrays[name].shape}")
        names = Names(arrays["blob"], arrays["offsets"])
        labels, crc32 = arrays["labels"], arrays["crc32"]
        if not len(names.offsets) or names.offsets[0] < 0 or names.offsets[-1] > len(names.blob):
            raise ValueError("names beyond the end")
        if (np.diff(names.offsets) < 0).any():
            raise ValueError("names of a length below 0")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {_AGAIN}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"cannot read {path} ({error}); {_AGAIN}") from error
    if not len(names) == len(labels) == len(crc32) == split.images:
        raise UserError(f"{path}: {len(labels)} images, but {MANIFEST} says {split.images}; {_AGAIN}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise UserError(f"{path}: labels outside the {num_classes} classes of {MANIFEST}; {_AGAIN}")
    return names, labels, crc32


def load_packed(name: str, data_dir: str | Path) -> StreamedDataset:
    """Open a folder of packed images.

    Args:
      name: of the data set.
      data_dir: the folder that holds manifest.json.

    Raises:
      UserError: a file is missing, cut short, or not the one of the manifest.
    """
    folder = Path(data_dir).expanduser()
    manifest = read_manifest(folder)
    train, val = (open_split(folder, manifest, split) for split in ("train", "val"))
    return StreamedDataset(name, folder, train, val, manifest.class_names)


def load_packed_test(name: str, data_dir: str | Path) -> LabelledImages:
    """Open the packed images to test on; the files of the others need not be there.

    Args:
      name: of the data set.
      data_dir: the folder that holds manifest.json.

    Raises:
      UserError: a file is missing, cut short, or not the one of the manifest.
    """
    folder = Path(data_dir).expanduser()
    manifest = read_manifest(folder)
    return decoded_images(name, open_split(folder, manifest, "val"), manifest.class_names)
