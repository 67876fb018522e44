"""CIFAR-10 from its official folders or archives; downloaded where there is none of them."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import http.client
import os
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from resnet_jax.data.array_pickle import load_arrays
from resnet_jax.data.dataset import Dataset, Split, make_split
from resnet_jax.errors import UserError

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
TIMEOUT = 20  # seconds without an answer
MAX_DOWNLOAD_BYTES = 200_000_000  # the official archive has 170,052,171
MAX_ARCHIVE_BYTES = 1 << 29  # unpacked; the official archives have some 184 MB
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
        planes, labels = np.asarray(batch["data"]), np.asarray(batch["labels"])
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
    return _load_folder(path, form) if form else _load_archive(path)


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


def _load_folder(folder: Path, form: _Form) -> Dataset:
    splits = {}
    for name in form.files:
        path = folder / name
        try:
            if not path.is_file():
                size = f"{RECORDS_PER_FILE * RECORD_BYTES:,} bytes" if form is BINARY else "a file"
                raise UserError(f"{path}: expected {size}, found none; {form.way_out}")
            form.check_size(path.stat().st_size, str(path))  # before it is read
            splits[name] = form.decode(path.read_bytes(), str(path))
        except OSError as error:
            raise UserError(f"{path}: could not be read ({error.strerror}); {form.way_out}") from error
    return _dataset(splits, form, folder)


def _load_archive(path: Path) -> Dataset:
    splits: dict[_Form, dict[str, Split]] = {BINARY: {}, PYTHON: {}}
    for form, name, content in _archive_members(path):
        splits[form][name] = form.decode(content, f"{path} ({form.folder}/{name})")
    form = PYTHON if splits[PYTHON] and not splits[BINARY] else BINARY
    return _dataset(splits[form], form, path)


def _archive_members(path: Path) -> Iterator[tuple[_Form, str, bytes]]:
    """Yield the official files in a .tar.gz by their exact names; whatever else it holds is passed over."""
    wanted = {f"{form.folder}/{name}": (form, name) for form in (BINARY, PYTHON) for name in form.files}
    try:
        with gzip.open(path) as unzipped, tarfile.open(fileobj=unzipped, mode="r:") as archive:
            for member in archive:
                if member.offset_data + member.size > MAX_ARCHIVE_BYTES:
                    raise UserError(f"{path}: unpacks to more than {MAX_ARCHIVE_BYTES:,} bytes; not CIFAR-10")
                if member.name not in wanted:
                    continue
                form, name = wanted[member.name]
                source = f"{path} ({member.name})"
                stream = archive.extractfile(member) if member.isreg() else None  # never follow a link
                if stream is None:
                    raise UserError(f"{source}: not a regular file; {form.way_out}")
                form.check_size(member.size, source)
                content = stream.read(member.size + 1)
                form.check_size(len(content), source)
                yield form, name, content
            while unzipped.read(1 << 20):  # to the check sum at the end
                if unzipped.tell() > MAX_ARCHIVE_BYTES:
                    raise UserError(f"{path}: unpacks to more than {MAX_ARCHIVE_BYTES:,} bytes; not CIFAR-10")
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(
            f"{path}: truncated, damaged or no .tar.gz ({error}); take {BINARY.archive} anew ({PAGE})"
        ) from error


def _download(data_dir: Path) -> None:
    """Download the binary archive and leave its folder in `data_dir`, or leave nothing at all."""
    created = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="cifar-10-", suffix=".part", dir=data_dir) as temporary:
            archive, folder = Path(temporary, BINARY.archive), Path(temporary, BINARY.folder)
            _fetch(archive)
            folder.mkdir()
            for _, name, content in _archive_members(archive):
                (folder / name).write_bytes(content)
            if not (data_dir / BINARY.folder).is_dir():  # else another process was quicker
                os.replace(folder, data_dir / BINARY.folder)
    except BaseException as error:
        for empty in created:
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()
        if not isinstance(error, (OSError, http.client.HTTPException, UserError)):
            raise
        reason = error.reason if type(error) is urllib.error.URLError else error  # which only wraps it
        raise UserError(
            f"could not download CIFAR-10 ({reason}): put {BINARY.archive} from {PAGE} into {data_dir},"
            " or pass --data.dir FOLDER"
        ) from error


def _fetch(path: Path) -> None:
    digest, size = hashlib.md5(usedforsecurity=False), 0
    with urllib.request.urlopen(URL, timeout=TIMEOUT) as response, path.open("wb") as file:
        for chunk in _with_progress(iter(lambda: response.read(1 << 18), b""), response.length):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            if size > MAX_DOWNLOAD_BYTES:
                raise UserError(f"{URL} is larger than {MAX_DOWNLOAD_BYTES:,} bytes")
    if digest.hexdigest() != MD5:
        raise UserError(f"{URL} gave {size:,} bytes of MD5 {digest.hexdigest()}, not {MD5}")


def _with_progress(chunks: Iterable[bytes], total: int | None) -> Iterator[bytes]:
    """Show how much of `total` bytes (None: unknown) has come, on a terminal only."""
    if not sys.stderr.isatty():
        yield from chunks
        return
    from rich import progress
    from rich.console import Console

    columns = (progress.TextColumn("CIFAR-10"), progress.BarColumn(), progress.DownloadColumn())
    with progress.Progress(*columns, progress.TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        for chunk in chunks:
            yield chunk
            bar.update(task, advance=len(chunk))
