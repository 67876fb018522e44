"""Read and decode every image of a data set, to tell what is wrong before it is trained on."""

from __future__ import annotations

import dataclasses
import itertools
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resnet_jax.data.decode import BrokenImageError, open_image, to_rgb
from resnet_jax.data.processes import Advance, run_tasks
from resnet_jax.data.sources.image_folder import list_train, list_val
from resnet_jax.data.sources.packed import Shard, is_packed, open_split, read_manifest
from resnet_jax.data.sources.shards import sha256_of
from resnet_jax.data.tools.check_report import Finding, Report, SplitReport
from resnet_jax.data.types import EncodedImages

_AT_ONCE = 64  # images of a task
_GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "F"}  # Pillow's modes without colour
_FORMATS = {  # of Pillow, by what a file's name ends in; MPO is a JPEG with further pictures behind it
    ".jpeg": ("JPEG", "MPO"),
    ".jpg": ("JPEG", "MPO"),
    ".png": ("PNG",),
    ".webp": ("WEBP",),
    ".bmp": ("BMP",),
    ".ppm": ("PPM",),
    ".gif": ("GIF",),
    ".tif": ("TIFF",),
    ".tiff": ("TIFF",),
}
_KINDS = ("unreadable", "damaged_shards", "empty", "cmyk", "grey", "other_format")


def check(data_dir: Path, *, workers: int = 1) -> Report:
    """Decode every image of a folder, with or without val/, or of packed images.

    Args:
      data_dir: the folder that holds train/ or manifest.json.
      workers: processes.

    Raises:
      UserError: the folder, or a file that lists the images, is wrong.
    """
    packed = is_packed(data_dir)
    class_names, splits = _open_packed(data_dir) if packed else _open_folder(data_dir)
    tasks = [task for name, split in splits.items() for task in split.tasks(name)]
    images = sum(len(split.images) for split in splits.values())
    examine = _Examine(data_dir, {name: split.images for name, split in splits.items()}, names_tell=not packed)
    parts = list(run_tasks(examine, tasks, workers=workers, title="images", images=images))
    reports = {}
    for name, split in splits.items():
        of_split = [part for task, part in zip(tasks, parts, strict=True) if task.split == name]
        reports[name] = _merge(split, len(class_names), of_split)
    return Report(str(data_dir), "packed" if packed else "folder", class_names, reports)


class _Task(NamedTuple):
    split: str
    start: int  # of the images
    stop: int
    shard: Shard | None  # that holds just these


class _Split(NamedTuple):
    images: EncodedImages
    shards: tuple[Shard, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()

    def tasks(self, name: str) -> list[_Task]:
        if self.shards:
            stops = itertools.accumulate(shard.images for shard in self.shards)
            return [
                _Task(name, stop - shard.images, stop, shard) for shard, stop in zip(self.shards, stops, strict=True)
            ]
        count = len(self.images)
        return [_Task(name, start, min(start + _AT_ONCE, count), None) for start in range(0, count, _AT_ONCE)]


def _open_folder(folder: Path) -> tuple[tuple[str, ...], dict[str, _Split]]:
    train, class_names = list_train(folder)
    splits = {"train": _Split(train)}
    if (folder / "val").is_dir():
        splits["val"] = _Split(list_val(folder, class_names))
    return class_names, splits


def _open_packed(folder: Path) -> tuple[tuple[str, ...], dict[str, _Split]]:
    manifest = read_manifest(folder)
    return manifest.class_names, {
        name: _Split(open_split(folder, manifest, name), split.shards, split.skipped)
        for name, split in manifest.splits.items()
    }


class _Part(NamedTuple):
    """What a task found: sizes [N, 2] (width, height) of the readable images, and (kind, finding) pairs."""

    sizes: np.ndarray
    findings: list[tuple[str, Finding]]


@dataclasses.dataclass(frozen=True)
class _Examine:
    folder: Path
    splits: dict[str, EncodedImages]
    names_tell: bool  # whether the name of an image says of which format it is

    def __call__(self, task: _Task, advance: Advance) -> _Part:
        sizes, findings = [], []
        if task.shard is not None:  # first: the images are then read from memory
            findings += self._check_shard(task.shard)
        images = self.splits[task.split]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about metadata
            for index in range(task.start, task.stop):
                size, found = self._check_image(images, index)
                sizes += [size] if size else []
                findings += found
                advance(1)
        return _Part(np.array(sizes, np.int64).reshape(-1, 2), findings)

    def _check_shard(self, shard: Shard) -> list[tuple[str, Finding]]:
        try:
            same = sha256_of(self.folder / shard.file) == shard.sha256
        except OSError as error:
            return [("damaged_shards", Finding(shard.file, str(error.strerror)))]
        return [] if same else [("damaged_shards", Finding(shard.file, "its SHA-256 is not that of the manifest"))]

    def _check_image(
        self, images: EncodedImages, index: int
    ) -> tuple[tuple[int, int] | None, list[tuple[str, Finding]]]:
        name, content = images.id(index), None
        try:
            content, _ = images.read(index)
            image = open_image(content)
            to_rgb(image)
        except BrokenImageError as error:
            unreadable = [("unreadable", Finding(name, str(error)))]
            return None, unreadable + ([("empty", Finding(name))] if content == b"" else [])
        found = []
        if image.mode == "CMYK":
            found.append(("cmyk", Finding(name)))
        if image.mode in _GREY:
            found.append(("grey", Finding(name)))
        if self.names_tell and image.format not in _FORMATS[os.path.splitext(name)[1].lower()]:
            found.append(("other_format", Finding(name, str(image.format))))
        return image.size, found


def _merge(split: _Split, num_classes: int, parts: list[_Part]) -> SplitReport:
    per_class = np.bincount(split.images.labels, minlength=num_classes)
    sizes = np.concatenate([part.sizes for part in parts])
    found: dict[str, list[Finding]] = {kind: [] for kind in _KINDS}
    for part in parts:
        for kind, finding in part.findings:
            found[kind].append(finding)
    return SplitReport(
        images=len(split.images),
        per_class=(int(per_class.min()), float(np.median(per_class)), int(per_class.max())),
        smallest=tuple(sizes.min(0).tolist()) if len(sizes) else None,
        largest=tuple(sizes.max(0).tolist()) if len(sizes) else None,
        left_out=[Finding(*skipped) for skipped in split.left_out],
        **found,
    )
