"""Images packed into a few large files by pack.py: read faster than a million small ones, and checked as they are."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from resnet_jax.data.decode import BrokenImageError
from resnet_jax.data.sources.names import Names
from resnet_jax.data.sources.shards import open_shard, read_record, sha256_of
from resnet_jax.data.splits import classes_without, decoded_images
from resnet_jax.data.types import LabelledImages, StreamedDataset
from resnet_jax.errors import UserError, reason
from resnet_jax.files import read_arrays, read_text

MANIFEST = "manifest.json"
FORMAT: Literal["resnet_jax packed images 1"] = "resnet_jax packed images 1"
SplitName = Literal["train", "val"]
_AGAIN = "copy it again or pack the images anew"


@dataclass(frozen=True)
class Shard:
    """A file of images: how many, its size, and its SHA-256."""

    file: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class PackedSplit:
    """Files of a split: its shards in order, an index of labels and names, and what was left out."""

    images: int
    shards: tuple[Shard, ...]
    index_file: str
    index_sha256: str
    skipped: tuple[tuple[str, str], ...]  # (id, why it cannot be read)


@dataclass(frozen=True)
class Manifest:
    """What is in a folder of packed images; this file is written last.

    Attributes:
      class_names: of the labels.
      options: of the packing.
      source: SHA-256 of the names and labels that were packed, of each split.
      splits: "train" and "val".
      format: of the files.
    """

    class_names: tuple[str, ...]
    options: dict[str, Any]
    source: dict[str, str]
    splits: Annotated[dict[SplitName, PackedSplit], Field(min_length=2)]
    format: Literal["resnet_jax packed images 1"]


def is_packed(folder: str | Path) -> bool:
    """Tell whether a folder holds packed images."""
    return (Path(folder).expanduser() / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read what is in a folder of packed images.

    Raises:
      UserError: the manifest cannot be read, or is not of this program.
    """
    path = folder / MANIFEST
    try:
        return TypeAdapter(Manifest).validate_json(read_text(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    except ValueError as error:
        raise UserError(f"{path}: not a manifest of packed images ({reason(error)}); {_AGAIN}") from error


class PackedImages:
    """Packed images and their labels: EncodedImages. Each process opens the files when it first reads from them."""

    def __init__(self, folder: Path, shards: tuple[Shard, ...], names: Names, labels: np.ndarray):
        """Take the shards in order and, of all images in order, names and labels (int32)."""
        self.labels = labels
        self._folder, self._shards, self._names = folder, shards, names
        self._ends = np.cumsum([shard.images for shard in shards])

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
            return read_record(self._readers[shard], position), int(self.labels[index])
        except UserError as error:
            raise BrokenImageError(str(error)) from error

    @functools.cached_property
    def _readers(self) -> list[ArrayRecordReader]:
        return [open_shard(self._folder / shard.file, shard.images) for shard in self._shards]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_readers"}


def open_split(folder: Path, manifest: Manifest, name: SplitName) -> PackedImages:
    """Open a split, and check that all its files are there, complete as far as a look at them tells.

    Raises:
      UserError: a file is missing, cut short, or not the one of the manifest.
    """
    split = manifest.splits[name]
    for shard in split.shards:
        open_shard(folder / shard.file, shard.images).close()
    path = folder / split.index_file
    try:
        same = sha256_of(path) == split.index_sha256
        index = read_arrays(path) if same else {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}; {_AGAIN}") from error
    if not same:
        raise UserError(f"{path}: its SHA-256 is not that of {MANIFEST}; {_AGAIN}")
    if len(index["labels"]) and index["labels"].max() >= len(manifest.class_names):
        raise UserError(f"{path}: labels outside the {len(manifest.class_names)} classes of {MANIFEST}; {_AGAIN}")
    return PackedImages(folder, split.shards, Names(index["blob"], index["offsets"]), index["labels"])


def load_packed(name: str, data_dir: str | Path) -> StreamedDataset:
    """Open a folder of packed images.

    Raises:
      UserError: a file is missing, cut short, or not the one of the manifest.
    """
    folder = Path(data_dir).expanduser()
    manifest = read_manifest(folder)
    train, val = open_split(folder, manifest, "train"), open_split(folder, manifest, "val")
    untested = classes_without(val, manifest.class_names)
    return StreamedDataset(name, folder, train, val, manifest.class_names, untested=untested)


def load_packed_test(name: str, data_dir: str | Path) -> LabelledImages:
    """Open the packed images to test on; the files of the others need not be there.

    Raises:
      UserError: a file is missing, cut short, or not the one of the manifest.
    """
    folder = Path(data_dir).expanduser()
    manifest = read_manifest(folder)
    return decoded_images(name, open_split(folder, manifest, "val"), manifest.class_names)
