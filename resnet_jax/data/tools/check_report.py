"""What check.py finds in a data set, as text and as plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from resnet_jax.errors import printable

_SHOWN = 10  # names of a note in the text
_MISTAKES = {"unreadable": "cannot be read", "damaged_shards": "damaged files"}
_NOTES = {
    "empty": "of these are empty files",
    "cmyk": "in CMYK, converted to RGB when they are read",
    "grey": "grey, converted to RGB when they are read",
    "other_format": "of another format than the name says, which does not matter",
    "left_out": "could not be read when they were packed, and were left out",
}


class Finding(NamedTuple):
    """Something about an image: what it is called, and in words where there is more to say."""

    id: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class SplitReport:
    """What is in a split.

    Attributes:
      images: how many there are, the unreadable ones too.
      per_class: smallest, median and largest number of images of a class.
      smallest, largest: image, (width, height) in pixels, each side by itself; None if no image can be read.
      unreadable: images that cannot be decoded, and why.
      empty: those of them that are files of zero bytes.
      cmyk, grey: images that are converted to RGB when they are read.
      other_format: images whose content is of another format than their name says.
      damaged_shards: files of packed images that have changed since.
      left_out: images that could not be read when they were packed.
    """

    images: int
    per_class: tuple[int, float, int]
    smallest: tuple[int, int] | None
    largest: tuple[int, int] | None
    unreadable: list[Finding]
    empty: list[Finding]
    cmyk: list[Finding]
    grey: list[Finding]
    other_format: list[Finding]
    damaged_shards: list[Finding]
    left_out: list[Finding]


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
        return not any(split.unreadable or split.damaged_shards for split in self.splits.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        splits = {}
        for name, split in self.splits.items():
            splits[name] = {
                field.name: [finding._asdict() for finding in value] if isinstance(value, list) else value
                for field in dataclasses.fields(split)
                for value in [getattr(split, field.name)]
            }
        return {**vars(self), "splits": splits, "readable": self.readable}

    def to_text(self) -> str:
        """Return lines; of what is only worth a note, the first names."""
        kind = "packed images" if self.kind == "packed" else "a folder of images"
        classes = f"{len(self.class_names)} classes: {_some(self.class_names)}"
        lines = [f"{self.folder}: {kind}", classes]
        for name, split in self.splits.items():
            lines += ["", *_split_lines(name, split)]
        if "val" not in self.splits:
            lines += ["", "val: not there; training needs images to test on"]
        return "\n".join(map(printable, lines))


def _split_lines(name: str, split: SplitReport) -> list[str]:
    fewest, median, most = split.per_class
    lines = [f"{name}: {split.images:,} images, {fewest} to {most} of a class (median {median:g})"]
    if split.smallest and split.largest:
        (low_w, low_h), (high_w, high_h) = split.smallest, split.largest
        lines.append(f"  {low_w} to {high_w} pixels wide, {low_h} to {high_h} high")
    for kind, what in _MISTAKES.items():
        findings = getattr(split, kind)
        lines += [f"  {len(findings):,} {what}:"] if findings else []
        lines += [f"    {name}/{finding.id}: {finding.detail}" for finding in findings]
    for kind, what in _NOTES.items():
        if findings := getattr(split, kind):
            lines.append(f"  {len(findings):,} {what}: {_some([' is '.join(filter(None, each)) for each in findings])}")
    return lines


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
