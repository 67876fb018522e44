"""CIFAR-10 from its official folders or archives; downloaded where there is none of them."""

from __future__ import annotations

import dataclasses
import gzip
import http.client
import os
import tarfile
import tempfile
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.data.array_pickle import load_arrays
from resnet_jax.data.download import fetch
from resnet_jax.data.inside import check_inside, read_file
from resnet_jax.data.splits import make_split
from resnet_jax.data.types import Dataset, Split
from resnet_jax.errors import UserError, printable

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE_BYTES = 170_052_171
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # as that page says
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"  # as TensorFlow Datasets says
MAX_UNPACKED_BYTES = 1 << 28  # the official archives have some 184 MB
MAX_MEMBERS = 100  # the official archives have 9
MAX_PICKLE_BYTES = 1 << 26  # the official ones have 31 MB

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORDS_PER_FILE = 10_000
PIXEL_BYTES = 3072  # R, G and B plane, row-major
RECORD_BYTES = 1 + PIXEL_BYTES  # the label comes first


@dataclasses.dataclass(frozen=True)
class _Form:
    """One of the two official forms: six files, the last of them the test images."""

    folder: str
    archive: str
    suffix: str
    decode: Callable[[bytes, str], Split]

    @property
    def files(self) -> tuple[str, ...]:
        names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
        return tuple(name + self.suffix for name in names)

    def check_size(self, size: int, source: str) -> None:
        """Raise UserError unless a file of `size` bytes can be one of this form."""
        limit = RECORDS_PER_FILE * RECORD_BYTES if self is BINARY else MAX_PICKLE_BYTES
        if size > limit or (self is BINARY and size < limit):
            expected = f"{limit:,}" if self is BINARY else f"at most {limit:,}"
            raise UserError(f"{source}: expected {expected} bytes, found {size:,}; {self.way_out}")

    @property
    def way_out(self) -> str:
        return f"take it anew from {self.archive} ({PAGE})"


def _to_split(planes: np.ndarray, labels: np.ndarray, source: str) -> Split:
    """Turn planes [N, 3072] and labels [N] into a Split of images [N, 32, 32, 3], C-contiguous."""
    images = np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return make_split(images, labels, len(CLASS_NAMES), source)


def _decode_binary(content: bytes, source: str) -> Split:
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD_BYTES)
    return _to_split(records[:, 1:], records[:, 0], source)


def _decode_pickle(content: bytes, source: str) -> Split:
    try:
        batch = load_arrays(content)
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        planes, labels = _to_array(batch["data"]), _to_array(batch["labels"])
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{source}: not a pickled CIFAR-10 batch ({reason}); {PYTHON.way_out}") from error
    shape = (RECORDS_PER_FILE, PIXEL_BYTES)
    found = (planes.shape, str(planes.dtype), labels.shape, labels.dtype.kind in "iu")
    if found != (shape, "uint8", shape[:1], True):
        raise UserError(
            f"{source}: expected data uint8 {shape} and {shape[0]} integer labels, found data {planes.dtype}"
            f" {planes.shape} and labels {labels.dtype} {labels.shape}; {PYTHON.way_out}"
        )
    return _to_split(planes, labels, source)


def _to_array(value: Any) -> np.ndarray:
    """Make an array of a list of numbers; lists in lists, which may be the same one many times, would have no end."""
    if isinstance(value, list) and not all(type(item) in (int, float, bool) for item in value):
        raise ValueError("a list of what are no numbers")
    return np.asarray(value)


BINARY = _Form("cifar-10-batches-bin", "cifar-10-binary.tar.gz", ".bin", _decode_binary)
PYTHON = _Form("cifar-10-batches-py", "cifar-10-python.tar.gz", "", _decode_pickle)


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
        raise UserError(f"{data_dir}: could not be read ({error.strerror}); check --data.dir") from error
    if found is None:
        _download(data_dir)
        found = data_dir / BINARY.folder, BINARY
    path, form = found
    return _load_folder(path, form, data_dir) if form else _load_archive(path, data_dir)


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


def _dataset(splits: dict[str, Split], form: _Form, source: Path) -> Dataset:
    for name in form.files:
        if name not in splits:
            raise UserError(f"{source}: has no {form.folder}/{name}; {form.way_out}")
    *train, test = (splits[name] for name in form.files)
    images = np.concatenate([split.images for split in train])
    labels = np.concatenate([split.labels for split in train])
    return Dataset(name="cifar10", train=Split(images, labels), test=test, class_names=CLASS_NAMES)


def _load_folder(folder: Path, form: _Form, data_dir: Path) -> Dataset:
    splits = {}
    check_inside(folder, data_dir)
    for name in form.files:
        path = folder / name
        try:
            if not path.is_file():
                size = f"{RECORDS_PER_FILE * RECORD_BYTES:,} bytes" if form is BINARY else "a file"
                raise UserError(f"{path}: expected {size}, found none; {form.way_out}")
            check_inside(path, data_dir)
            form.check_size(path.stat().st_size, str(path))  # before it is read
            splits[name] = form.decode(read_file(path), str(path))
        except OSError as error:
            raise UserError(f"{path}: could not be read ({error.strerror}); {form.way_out}") from error
    return _dataset(splits, form, folder)


def _load_archive(path: Path, data_dir: Path) -> Dataset:
    check_inside(path, data_dir)
    splits: dict[_Form, dict[str, Split]] = {BINARY: {}, PYTHON: {}}
    for form, name, content in _archive_members(path):
        splits[form][name] = form.decode(content, f"{path} ({form.folder}/{name})")
    form = PYTHON if splits[PYTHON] and not splits[BINARY] else BINARY
    return _dataset(splits[form], form, path)


def _archive_members(path: Path) -> Iterator[tuple[_Form, str, bytes]]:
    """Yield the official files in a .tar.gz by their exact names; nothing is extracted, and no link followed."""
    try:
        with gzip.open(path) as file, _open_tar(unzipped := _Unzipped(file, path)) as archive:
            yield from _official_members(archive, path)
            while unzipped.read(1 << 20):  # to the check sum at the end
                pass
    except UserError:
        raise
    except Exception as error:  # OSError, EOFError, zlib.error, TarError, RecursionError: a damaged archive can do much
        reason = printable(str(error)[:200]) or type(error).__name__
        raise UserError(
            f"{path}: truncated, damaged or no .tar.gz ({reason}); take {BINARY.archive} anew ({PAGE})"
        ) from error


def _open_tar(file: Any) -> tarfile.TarFile:
    # Forwards only ("r|"), so that no size in a header, such as a negative one, leads back to where it was.
    return tarfile.open(fileobj=file, mode="r|", bufsize=1 << 18)


def _official_members(archive: tarfile.TarFile, path: Path) -> Iterator[tuple[_Form, str, bytes]]:
    wanted = {f"{form.folder}/{name}": (form, name) for form in (BINARY, PYTHON) for name in form.files}
    seen = set()
    for count, member in enumerate(archive):
        if count == MAX_MEMBERS:
            raise UserError(f"{path}: holds more than {MAX_MEMBERS} files; not CIFAR-10")
        if member.name not in wanted:
            continue
        form, name = wanted[member.name]
        source = f"{path} ({member.name})"
        if member.name in seen:
            raise UserError(f"{source}: is in it twice; {form.way_out}")
        seen.add(member.name)
        stream = archive.extractfile(member) if member.isreg() else None  # never follow a link
        if stream is None:
            raise UserError(f"{source}: not a regular file; {form.way_out}")
        form.check_size(member.size, source)
        content = stream.read(member.size + 1)
        form.check_size(len(content), source)
        yield form, name, content


class _Unzipped:
    """What a .gz file unpacks to: a small file can hold a thousand times as much."""

    def __init__(self, file: gzip.GzipFile, path: Path):
        self._file, self._path = file, path

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        if self._file.tell() > MAX_UNPACKED_BYTES:
            raise UserError(f"{self._path}: unpacks to more than {MAX_UNPACKED_BYTES:,} bytes; not CIFAR-10")
        return content


def _download(data_dir: Path) -> None:
    """Download the binary archive and leave its folder in `data_dir`, or leave nothing at all."""
    created = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="cifar-10-", suffix=".part", dir=data_dir) as temporary:
            archive, folder = Path(temporary, BINARY.archive), Path(temporary, BINARY.folder)
            fetch(URL, archive, size=ARCHIVE_BYTES, digests={"md5": MD5, "sha256": SHA256}, title="CIFAR-10")
            folder.mkdir()
            for form, name, content in _archive_members(archive):
                if form is BINARY:
                    (folder / name).write_bytes(content)
            if missing := [name for name in BINARY.files if not (folder / name).exists()]:
                raise UserError(f"{URL}: has no {BINARY.folder}/{missing[0]}")
            if not (data_dir / BINARY.folder).is_dir():  # else another process was quicker
                os.replace(folder, data_dir / BINARY.folder)
    except BaseException as error:
        for empty in created:
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()
        if not isinstance(error, (OSError, http.client.HTTPException, UserError)):
            raise
        reason = error.reason if type(error) is urllib.error.URLError else error  # which only wraps it
        in_a_line = printable(" ".join(str(reason).split()))  # it may be the server's words
        raise UserError(
            f"could not download CIFAR-10 ({in_a_line}): put {BINARY.archive} from {PAGE} into {data_dir},"
            " or pass --data.dir FOLDER"
        ) from error
