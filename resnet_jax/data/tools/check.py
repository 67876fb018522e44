"""Read and decode every image of a data set, to tell what is wrong before it is trained on."""

from __future__ import annotations

import dataclasses
import itertools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from resnet_jax.data.decode import FORMATS, BrokenImageError, open_image, orientation, to_rgb
from resnet_jax.data.processes import Advance, run_tasks
from resnet_jax.data.sources.image_folder import ignored_files, list_train, list_val, val_folder
from resnet_jax.data.sources.packed import Shard, is_packed, open_split, read_manifest
from resnet_jax.data.sources.shards import sha256_of
from resnet_jax.data.types import EncodedImages
from resnet_jax.errors import printable, reason

_AT_ONCE = 64  # images of a task
_SHOWN = 10  # names of a note in the text
_GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L"}  # Pillow's modes without colour
# Kinds of findings: mistakes, and what is only worth a note.
_MISTAKES = {"unreadable": "cannot be read", "damaged_shards": "damaged files"}
_NOTES = {
    "empty": "of these are empty files",
    "cmyk": "in CMYK, converted to RGB when they are read",
    "grey": "grey, converted to RGB when they are read",
    "deep": "of more than 8 bits, scaled to 8 when they are read",
    "transparent": "with transparent pixels, which show white",
    "turned": "that their cameras marked to be turned, and are read as they lie (--data.upright turns them)",
    "other_format": "of another format than the name says, which does not matter",
    "left_out": "could not be read when they were packed, and were left out",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something about an image or a shard: what it is called, and in words where there is more to say."""

    id: str
    detail: str = ""


Findings = list[tuple[str, Finding]]  # (kind, finding)


@dataclasses.dataclass(frozen=True)
class SplitReport:
    """What is in a split.

    Attributes:
      images: how many there are, the unreadable ones too.
      per_class: smallest, median and largest number of images of a class.
      smallest, largest: image, (width, height) in pixels, each side by itself; None if no image can be read.
      findings: by kind: those of _MISTAKES and _NOTES.
      ignored: how many other files there are, by what their names end in.
    """

    images: int
    per_class: tuple[int, float, int]
    smallest: tuple[int, int] | None
    largest: tuple[int, int] | None
    findings: dict[str, list[Finding]]
    ignored: dict[str, int]

    def to_lines(self, name: str) -> list[str]:
        """Return lines; of what is only worth a note, the first names."""
        fewest, median, most = self.per_class
        lines = [f"{name}: {self.images:,} images, {fewest} to {most} of a class (median {median:g})"]
        if self.smallest and self.largest:
            (low_w, low_h), (high_w, high_h) = self.smallest, self.largest
            lines.append(f"  {low_w} to {high_w} pixels wide, {low_h} to {high_h} high")
        for kind, findings in self.findings.items():
            if findings and kind in _MISTAKES:
                lines.append(f"  {len(findings):,} {_MISTAKES[kind]}:")
                lines += [f"    {name}/{finding.id}: {finding.detail}" for finding in findings]
            elif findings:
                names = [" is ".join(filter(None, (finding.id, finding.detail))) for finding in findings]
                lines.append(f"  {len(findings):,} {_NOTES[kind]}: {_some(names)}")
        if self.ignored:
            lines.append(f"  ignored: {', '.join(f'{count:,} {ending}' for ending, count in self.ignored.items())}")
        return lines


@dataclasses.dataclass(frozen=True)
class Report:
    """What is in a data set; `splits` are "train" and, if it is there, "val"."""

    folder: str
    kind: Literal["folder", "packed"]
    class_names: tuple[str, ...]
    splits: dict[str, SplitReport]

    @property
    def readable(self) -> bool:
        """Whether all images can be read and all shards are as they were written."""
        return not any(split.findings[kind] for split in self.splits.values() for kind in _MISTAKES)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; the kinds of findings stand in their split."""
        plain = dataclasses.asdict(self) | {"readable": self.readable}
        for split in plain["splits"].values():
            split.update(split.pop("findings"))
        return plain

    def to_text(self) -> str:
        """Return lines to read."""
        kind = "packed images" if self.kind == "packed" else "a folder of images"
        lines = [f"{self.folder}: {kind}", f"{len(self.class_names)} classes: {_some(self.class_names)}"]
        for name, split in self.splits.items():
            lines += ["", *split.to_lines(name)]
        if "val" not in self.splits:
            lines += ["", "val: not there; training needs images to test on"]
        return "\n".join(map(printable, lines))


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def check(data_dir: Path, *, workers: int = 1) -> Report:
    """Decode every image of a folder, with or without val/, or of packed images.

    Raises:
      UserError: the folder, or a file that lists the images, is wrong.
    """
    manifest = read_manifest(data_dir) if is_packed(data_dir) else None
    splits: dict[str, EncodedImages]
    if manifest:
        class_names = manifest.class_names
        splits = {name: open_split(data_dir, manifest, name) for name in manifest.splits}
        tasks = [task for name, split in manifest.splits.items() for task in _shard_tasks(name, split.shards)]
    else:
        train, class_names = list_train(data_dir)
        splits = {"train": train}
        if val_folder(data_dir).is_dir():
            splits["val"] = list_val(data_dir, class_names)
        tasks = [
            _Task(name, start, min(start + _AT_ONCE, len(images)))
            for name, images in splits.items()
            for start in range(0, len(images), _AT_ONCE)
        ]
    sizes: dict[str, list[np.ndarray]] = {name: [] for name in splits}
    findings: dict[str, dict[str, list[Finding]]]
    findings = {name: {kind: [] for kind in (*_MISTAKES, *_NOTES)} for name in splits}
    examine = _Examine(data_dir, splits, names_tell=manifest is None)
    images = sum(map(len, splits.values()))
    done = run_tasks(examine, tasks, workers=workers, images=images)
    for task, (sizes_of_task, findings_of_task) in zip(tasks, done, strict=True):
        sizes[task.split].append(sizes_of_task)
        for kind, finding in findings_of_task:
            findings[task.split][kind].append(finding)
    for name, split in manifest.splits.items() if manifest else ():
        findings[name]["left_out"] = [Finding(*skipped) for skipped in split.skipped]
    folders = {"train": data_dir / "train", "val": val_folder(data_dir)}
    ignored = {name: {} if manifest else ignored_files(folders[name], class_names) for name in splits}
    reports = {
        name: _report(images.labels, len(class_names), np.concatenate(sizes[name]), findings[name], ignored[name])
        for name, images in splits.items()
    }
    return Report(str(data_dir), "packed" if manifest else "folder", class_names, reports)


class _Task(NamedTuple):
    split: str
    start: int  # of the images
    stop: int
    shard: Shard | None = None  # that holds just these


def _shard_tasks(split: str, shards: Sequence[Shard]) -> list[_Task]:
    stops = itertools.accumulate(shard.images for shard in shards)
    return [_Task(split, stop - shard.images, stop, shard) for shard, stop in zip(shards, stops, strict=True)]


def _report(
    labels: np.ndarray,
    num_classes: int,
    sizes: np.ndarray,
    findings: dict[str, list[Finding]],
    ignored: dict[str, int],
) -> SplitReport:
    per_class = np.bincount(labels, minlength=num_classes)
    return SplitReport(
        images=len(labels),
        per_class=(int(per_class.min()), float(np.median(per_class)), int(per_class.max())),
        smallest=tuple(sizes.min(0).tolist()) if len(sizes) else None,
        largest=tuple(sizes.max(0).tolist()) if len(sizes) else None,
        findings=findings,
        ignored=ignored,
    )


@dataclasses.dataclass(frozen=True)
class _Examine:
    folder: Path
    splits: dict[str, EncodedImages]
    names_tell: bool  # whether the name of an image says of which format it is

    def __call__(self, task: _Task, advance: Advance) -> tuple[np.ndarray, Findings]:
        """Return the sizes [N, 2] (width, height) of the readable images, and what is found."""
        sizes = []
        findings = self._check_shard(task.shard) if task.shard else []  # first: the images are then read from memory
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about metadata
            for index in range(task.start, task.stop):
                size, found = self._check_image(self.splits[task.split], index)
                sizes += [size] if size else []
                findings += found
                advance(1)
        return np.array(sizes, np.int64).reshape(-1, 2), findings

    def _check_shard(self, shard: Shard) -> Findings:
        try:
            same = sha256_of(self.folder / shard.file) == shard.sha256
            wrong = None if same else "its SHA-256 is not that of the manifest"
        except OSError as error:
            wrong = reason(error)
        return [("damaged_shards", Finding(shard.file, wrong))] if wrong else []

    def _check_image(self, images: EncodedImages, index: int) -> tuple[tuple[int, int] | None, Findings]:
        name, content = images.id(index), None
        try:
            content, _ = images.read(index)
            image = open_image(content)
            to_rgb(image)
        except BrokenImageError as error:
            unreadable = [("unreadable", Finding(name, str(error)))]
            return None, unreadable + ([("empty", Finding(name))] if content == b"" else [])
        marks = {
            "cmyk": image.mode == "CMYK",
            "grey": image.mode in _GREY,
            "deep": image.mode.startswith("I"),
            "transparent": image.has_transparency_data,
            "turned": orientation(image) != 1,
        }
        found = [(kind, Finding(name)) for kind, is_so in marks.items() if is_so]
        form = "JPEG" if image.format == "MPO" else image.format  # that is a JPEG with further pictures behind it
        if self.names_tell and form != FORMATS[os.path.splitext(name)[1].lower()]:
            found.append(("other_format", Finding(name, str(image.format))))
        return image.size, found
