"""The official archives of CIFAR-10 and CIFAR-100: found as they are, unpacked or not, or downloaded."""

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
from typing import Any, NamedTuple

import numpy as np

from resnet_jax.data.sources.shards import sha256_of
from resnet_jax.data.types import Split
from resnet_jax.errors import UserError, optional, printable, reason

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
PIXEL_BYTES = 3072  # R, G and B plane, row-major


class Form(NamedTuple):
    """One of the official forms of a set: files in a folder, the last of them the test images."""

    folder: str
    archive: str
    files: tuple[str, ...]
    decode: Callable[[str, bytes], tuple[np.ndarray, np.ndarray]]  # name, content -> planes [N, 3072], labels [N]

    @property
    def way_out(self) -> str:
        return f"take it anew from {self.archive} ({PAGE})"


class Official(NamedTuple):
    """A set: its title, its forms, the first of which is downloaded from `url`, and the SHA-256 of their archives."""

    title: str
    forms: tuple[Form, ...]
    url: str
    sha256: dict[str, str]


def load_splits(data_dir: str | Path, official: Official) -> list[Split]:
    """Return the images [N, 32, 32, 3] uint8 of each official file, in its order.

    Args:
      data_dir: looked through for the official files or their folder, then an archive, form by form; may be such a
        folder or archive itself. Without any, one is downloaded into it.
      official: the set.

    Raises:
      UserError: a file is missing, damaged or not of the set, or the download failed.
    """
    data_dir = Path(data_dir).expanduser()
    try:
        found = _find(data_dir, official)
    except OSError as error:  # a folder that may not be entered
        raise UserError(f"{data_dir}: could not be read ({reason(error)}); check --data.dir") from error
    if found is None:
        _download(data_dir, official)
        found = data_dir / official.forms[0].folder, official.forms[0]
    path, form = found
    return _read_folder(path, form) if form else _read_archive(path, official)


def decode_records(content: bytes, records: int, label_bytes: int, label: int, classes: int) -> Any:
    """Take a binary file apart: planes [N, 3072] and labels [N].

    Args:
      content: so many `records`, each of some labels and the pixels.
      label_bytes: labels of a record.
      label: which of them.
      classes: how many there are.

    Raises:
      ValueError: another length, or a label that is none.
    """
    size = label_bytes + PIXEL_BYTES
    if len(content) != records * size:
        raise ValueError(f"expected {records * size:,} bytes, found {len(content):,}")
    rows = np.frombuffer(content, np.uint8).reshape(-1, size)
    labels = rows[:, label]
    outside = np.flatnonzero(labels >= classes)
    if len(outside):  # a one-hot label would silently be all zeros
        raise ValueError(f"label {labels[outside[0]]} of image {outside[0]} is outside 0..{classes - 1}")
    return rows[:, label_bytes:], labels


def decode_pickle(content: bytes, md5: str, labels: bytes) -> Any:
    """Take an official Python file apart: planes [N, 3072] and labels [N].

    A pickle is a program, so no other file is unpickled. Two files of one MD5 can be made together, but nobody can make
    a file that has the MD5 of a given one.

    Raises:
      ValueError: it is not the official file.
    """
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise ValueError("is not the official file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, about arrays that were pickled in 2009
        batch = pickle.loads(content, encoding="bytes")  # noqa: S301 (of the official file alone)
    return batch[b"data"], np.array(batch[labels])


def _find(data_dir: Path, official: Official) -> tuple[Path, Form | None] | None:
    """Return the folder and its form, or an archive and None, or None where there is nothing of the set."""
    if data_dir.is_file():
        return data_dir, None
    for form in official.forms:
        if any((data_dir / name).is_file() for name in form.files):
            return data_dir, form
        if (data_dir / form.folder).is_dir():
            return data_dir / form.folder, form
    for form in official.forms:
        if (data_dir / form.archive).is_file():
            return data_dir / form.archive, None
    return None


def _read_folder(folder: Path, form: Form) -> list[Split]:
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


def _read_archive(path: Path, official: Official) -> list[Split]:
    """Read the files in an official archive, without unpacking it."""
    try:
        checksum = sha256_of(path)
        form = next((form for form in official.forms if official.sha256[form.archive] == checksum), None)
        if form is None:
            raise UserError(f"{path}: is no official archive, or damaged; {official.forms[0].way_out}")
        with tarfile.open(path) as tar:
            files = {Path(member.name).name: file.read() for member in tar if (file := tar.extractfile(member))}
    except OSError as error:
        raise UserError(f"{path}: could not be read ({reason(error)}); {official.forms[0].way_out}") from error
    return [_to_split(*form.decode(name, files[name])) for name in form.files]


def _to_split(planes: np.ndarray, labels: np.ndarray) -> Split:
    images = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(images), labels.astype(np.int32))


def _download(data_dir: Path, official: Official) -> None:
    """Download the archive of the first form and leave its folder in `data_dir`, or leave nothing at all."""
    form = official.forms[0]
    pooch = optional("pooch", extra="download")
    pooch.get_logger().setLevel("WARNING")
    created = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="cifar-", suffix=".part", dir=data_dir) as temporary:
            is_terminal = sys.stderr.isatty()
            checksum = f"sha256:{official.sha256[form.archive]}"
            archive = pooch.retrieve(official.url, checksum, form.archive, temporary, progressbar=is_terminal)
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
            if not (data_dir / form.folder).is_dir():  # else another process was quicker
                os.replace(Path(temporary, form.folder), data_dir / form.folder)
    except (OSError, ValueError, tarfile.TarError) as error:
        in_a_line = printable(reason(error))  # it may be the server's words
        raise UserError(
            f"could not download {official.title} ({in_a_line}): put {form.archive} from {PAGE} into {data_dir},"
            " or pass --data.dir FOLDER"
        ) from error
    finally:
        for folder in created:
            with contextlib.suppress(OSError):  # not empty, as it should be
                folder.rmdir()
