"""ArrayRecord files, whose records can be read in any order; what is wrong with one is told in a line."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from resnet_jax.data.decode import BrokenImageError
from resnet_jax.errors import UserError, reason

_READ = "readahead_buffer_size:0,max_parallelism:0"  # single records, in random order
_READ_BUFFER = 1 << 15  # bytes
_WRITE = "group_size:1,uncompressed"  # each record by itself: they are images, which do not shrink further


def open_shard(path: Path, records: int) -> ArrayRecordReader:
    """Open a file of `records` images; several threads may read from it.

    Raises:
      UserError: it cannot be opened, or is cut short or damaged.
    """
    try:
        path.open("rb").close()  # the reader below takes a file that is not there for an empty one
        reader = _call(ArrayRecordReader, str(path), options=_READ, file_reader_buffer_size=_READ_BUFFER)
        found = _call(reader.num_records)
        if found != records:
            raise OSError(None, f"{found} of {records} images are found in it")
        return reader
    except OSError as error:
        raise UserError(f"{path}: unreadable shard ({reason(error)}): copy or prepare it again") from error


def read_record(reader: ArrayRecordReader, position: int) -> bytes:
    """Return a record.

    Raises:
      BrokenImageError: the file is damaged there.
    """
    try:
        return _call(reader.read, [position])[0]
    except (OSError, IndexError) as error:
        raise BrokenImageError(reason(error)) from error


def write_shard(path: Path, records: Iterable[bytes]) -> None:
    """Write records into a new file.

    Raises:
      OSError: it cannot be written.
    """
    writer = _call(ArrayRecordWriter, str(path), _WRITE)
    try:
        for record in records:
            _call(writer.write, record)
        _call(writer.close)
    finally:
        with contextlib.suppress(RuntimeError):
            if writer.is_open():
                writer.close()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits.

    Raises:
      OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _call(function: Any, *arguments: Any, **options: Any) -> Any:
    """Call a function of ArrayRecord, which raises RuntimeError when a disk is full or a file is damaged."""
    try:
        return function(*arguments, **options)
    except RuntimeError as error:
        # "write() failed: No space left on device; writing FILE; at byte 0", perhaps with a trace in further lines.
        line = str(error).splitlines()[0].split(";")[0].split(", chunk at")[0]
        raise OSError(None, line.removeprefix("write() failed: ")) from error
