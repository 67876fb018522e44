"""ArrayRecord files, whose records can be read in any order; what is wrong with one is told in a line."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from resnet_jax.data.decode import BrokenImageError
from resnet_jax.data.inside import open_regular
from resnet_jax.errors import UserError

_READ = "readahead_buffer_size:0,max_parallelism:0"  # single records, in random order
_READ_BUFFER = 1 << 15  # bytes
_WRITE = "group_size:1,uncompressed"  # each record by itself: they are images, which do not shrink further


def open_shard(path: Path, records: int) -> ArrayRecordReader:
    """Open a file that holds so many records; several threads may read from it.

    Raises:
      UserError: it cannot be opened, or is cut short or damaged.
    """
    try:
        open_regular(path).close()  # the reader below takes a file that is not there for an empty one
        reader = ArrayRecordReader(str(path), options=_READ, file_reader_buffer_size=_READ_BUFFER)
        found = reader.num_records()
    except OSError as error:
        raise UserError(f"{path}: unreadable shard ({error.strerror}): copy or prepare it again") from error
    except RuntimeError as error:
        raise UserError(f"{path}: unreadable shard ({_reason(error)}): copy or prepare it again") from error
    if found != records:
        raise UserError(
            f"{path}: unreadable shard ({found} of {records} images are found in it): copy or prepare it again"
        )
    return reader


def read_record(reader: ArrayRecordReader, position: int) -> bytes:
    """Return a record.

    Raises:
      BrokenImageError: the file is damaged there.
    """
    try:
        return reader.read([position])[0]
    except (RuntimeError, IndexError) as error:
        raise BrokenImageError(_reason(error)) from error


def write_shard(path: Path, records: Iterable[bytes]) -> None:
    """Write records into a new file.

    Raises:
      OSError: it cannot be written.
    """
    writer = None
    try:
        writer = _call(ArrayRecordWriter, str(path), _WRITE)
        for record in records:
            _call(writer.write, record)
        _call(writer.close)
    finally:
        with contextlib.suppress(RuntimeError):
            if writer is not None and writer.is_open():
                writer.close()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits.

    Raises:
      OSError: it cannot be read.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _call(function, *arguments):  # type: ignore[no-untyped-def]
    try:
        return function(*arguments)
    except RuntimeError as error:  # which is how ArrayRecord says that a disk is full
        raise OSError(None, _reason(error)) from error


def _reason(error: Exception) -> str:
    """Return the first part of messages such as "write() failed: No space left on device; writing FILE; at byte 0"."""
    return str(error).splitlines()[0].split(";")[0].split(", chunk at")[0].removeprefix("write() failed: ")
