"""Labels of images that lie in one flat folder: lines of a text file, or the table that Kaggle hands out."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from resnet_jax.errors import UserError, did_you_mean, reason

FILE_NAMES = ("val.txt", "val_labels.txt", "LOC_val_solution.csv")
_MOST_CLASSES = 100_000  # of a file that numbers them; ImageNet has 21,843 in all
_KAGGLE_HEADER = ["ImageId", "PredictionString"]
_KAGGLE_FOLDERS = ("ILSVRC", "Data", "CLS-LOC")  # the table lies above these, the images in them


class _Line(NamedTuple):
    number: int  # from 1
    image: str  # as the line has it
    label: str


def find_label_file(data_dir: Path) -> Path | None:
    """Return the first of FILE_NAMES beside `data_dir`/val, or where Kaggle's archive puts it; None: there is none."""
    folders = [data_dir]
    if data_dir.absolute().parts[-3:] == _KAGGLE_FOLDERS:
        folders.append(data_dir.absolute().parents[2])
    files = (folder / name for folder in folders for name in FILE_NAMES)
    return next((file for file in files if file.is_file()), None)


def read_labels(
    path: Path, folder: Path, files: Sequence[str], class_names: Sequence[str] | None
) -> tuple[list[int], tuple[str, ...]]:
    """Read the label of every file.

    Args:
      path: lines "FILE LABEL", or a .csv file with the columns ImageId (a file's name without its extension) and
        PredictionString (its first word is the class). A label is the name of a class, or its number from 0.
      folder: of the images.
      files: their names.
      class_names: the classes in order; None: those that the file names, sorted, or as many as its numbers need.

    Returns:
      The labels in the order of `files`, and the names of the classes.

    Raises:
      UserError: the file cannot be read, a line is malformed or names an unknown class, an image has two labels, none,
        or is not there.
    """
    kaggle = path.suffix == ".csv"
    try:
        lines = list(_kaggle_lines(path) if kaggle else _plain_lines(path))
    except (OSError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    if class_names is None:
        class_names = _named_classes([line.label for line in lines], path)
    numbers = {name: number for number, name in enumerate(class_names)}
    known = {(file.rpartition(".")[0] if kaggle else file): file for file in files}
    labels: dict[str, int] = {}
    for line in lines:
        where = f"{path}, line {line.number}"
        label = _label_number(line.label, numbers, where)
        file = known.get(line.image)
        if file is None:
            raise UserError(f"{where}: there is no image {line.image[:60]!r} in {folder}")
        if labels.setdefault(file, label) != label:
            before = class_names[labels[file]]
            raise UserError(f"{where}: {line.image!r} is of class {line.label!r}, but a line before says {before!r}")
    missing = next((file for file in files if file not in labels), None)
    if missing is not None:
        raise UserError(
            f"{path} has no line for {folder / missing} ({len(files) - len(labels)} of {len(files)} images have none):"
            " add them or move the images away"
        )
    return [labels[file] for file in files], tuple(class_names)


def _plain_lines(path: Path) -> Iterator[_Line]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:  # as names of files are decoded
        for number, line in enumerate(file, 1):
            text = line.strip()
            image, _, label = text.rpartition("\t" if "\t" in text else " ")
            if image and label:
                yield _Line(number, image.strip().removeprefix("val/"), label.strip())
            elif text:
                raise UserError(f"{path}, line {number}: expected FILE LABEL, found {text[:60]!r}")


def _kaggle_lines(path: Path) -> Iterator[_Line]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if header != _KAGGLE_HEADER:
            raise UserError(f"{path}, line 1: expected {','.join(_KAGGLE_HEADER)}, found {','.join(header)[:60]!r}")
        for row in filter(None, rows):
            if len(row) != 2 or not row[0] or not row[1].split():
                expected = ",".join(_KAGGLE_HEADER)
                raise UserError(f"{path}, line {rows.line_num}: expected {expected}, found {','.join(row)[:60]!r}")
            yield _Line(rows.line_num, row[0], row[1].split()[0])


def _named_classes(labels: Sequence[str], path: Path) -> tuple[str, ...]:
    """Return the classes of a file that is read without the training images, as for testing alone."""
    found = set(labels)
    if not found or not all(label.isdecimal() for label in found):
        return tuple(sorted(found))
    largest = max(map(int, found))
    if largest >= _MOST_CLASSES:
        raise UserError(f"{path}: class {largest} is beyond the {_MOST_CLASSES:,} that there can be")
    return tuple(map(str, range(largest + 1)))


def _label_number(label: str, numbers: dict[str, int], where: str) -> int:
    if label in numbers:
        return numbers[label]
    if not label.isdecimal():
        raise UserError(f"{where}: unknown class {label[:60]!r}{did_you_mean(label, numbers)}")
    if int(label) >= len(numbers):
        raise UserError(f"{where}: class {label} is outside 0..{len(numbers) - 1} (classes are numbered from 0)")
    return int(label)
