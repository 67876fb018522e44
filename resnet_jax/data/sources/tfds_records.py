"""Records of a TFDS set that is prepared as ArrayRecord, read without TensorFlow."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import resource
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.data.decode import BrokenImageError
from resnet_jax.data.sources.shards import open_shard
from resnet_jax.errors import UserError

BATCH = 1024  # records read in one call
AGAIN = "delete that folder and prepare it anew"


class TfdsImages:
    """The encoded images of a split: EncodedImages. Each process opens the files when it first reads from them."""

    def __init__(self, folder: Path, split: str, num_classes: int):
        """Take the folder of a prepared set, and one of its splits."""
        self._folder, self._split, self._num_classes = folder, split, num_classes

    def __len__(self) -> int:
        return len(self._source)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """[N] int32; they are stored with the images, so that all these are read for them."""
        labels = np.empty(len(self), np.int32)
        for start in range(0, len(self), BATCH):
            stop = min(start + BATCH, len(self))
            try:
                records = self._source.__getitems__(list(range(start, stop)))
            except Exception as error:
                raise unreadable(self._folder, self._split, start, stop, error) from error
            labels[start:stop] = [record["label"] for record in records]
        if len(labels) and not 0 <= labels.min() <= labels.max() < self._num_classes:
            raise UserError(f"{self._folder} ({self._split}): labels outside 0..{self._num_classes - 1}; {AGAIN}")
        return labels

    def id(self, index: int) -> str:
        """Return the split and the number, as these images have no names."""
        return f"{self._split}/{index}"

    def read(self, index: int) -> tuple[bytes, int]:
        """Return an image's content and its label.

        Raises:
          BrokenImageError: it cannot be read, or its label is none of the classes.
        """
        try:
            record = self._source[index]
            content, label = record["image"], int(record["label"])
        except Exception as error:  # of array_record, protobuf, tfds: whatever a damaged file leads to
            raise BrokenImageError(one_line(error)) from error
        if not 0 <= label < self._num_classes:
            raise BrokenImageError(f"its label {label} is outside 0..{self._num_classes - 1}")
        return content, label

    def check(self) -> None:
        """Check that all files can be opened and hold as many images as they should.

        Raises:
          UserError: one cannot, or does not.
        """
        for instruction in self._info.file_instructions:
            open_shard(Path(instruction.filename), instruction.examples_in_shard).close()

    @functools.cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        with quiet():
            return tfds.builder_from_directory(str(self._folder))

    @property
    def _info(self) -> Any:
        return self._builder.info.splits[self._split]

    @functools.cached_property
    def _source(self) -> Any:
        _allow_open_files(len(self._info.file_instructions))
        return open_records(self._builder, self._split, encoded=True)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_builder", "_source")}


def _allow_open_files(count: int) -> None:
    """Raise the limit of open files, often 1024, where so many more would exceed it: ImageNet has 1024 in TFDS."""
    with contextlib.suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = min(2 * count + 512, hard) if hard != resource.RLIM_INFINITY else 2 * count + 512
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def open_records(builder: Any, split: str, *, encoded: bool = False) -> Any:
    """Return the records of a split; their images are bytes if `encoded`.

    Raises:
      UserError: they are not ArrayRecord, or damaged.
    """
    import tensorflow_datasets as tfds

    folder = Path(builder.data_dir)
    try:
        decoders = {"image": tfds.decode.SkipDecoding()} if encoded else None
        return builder.as_data_source(split, decoders=decoders)
    except NotImplementedError as error:
        raise UserError(
            f"{folder}: prepared as {builder.info.file_format.value}, needs array_record; delete that folder"
            " and prepare it anew, or choose another --data.dir"
        ) from error
    except ImportError as error:  # TFDS asks for array_record on Linux only
        raise UserError(f"{folder}: {one_line(error)}; pip install array_record") from error
    except Exception as error:
        raise UserError(f"{folder}: could not be opened ({one_line(error)}); {AGAIN}") from error


def unreadable(folder: Path, split: str, start: int, stop: int, error: Exception) -> UserError:
    """Make the error of a batch of records that cannot be read."""
    return UserError(f"{folder}: {split} images {start}..{stop - 1} could not be read ({one_line(error)}); {AGAIN}")


def one_line(error: BaseException) -> str:
    """Return the message of an error of TFDS, shortened to a line."""
    text = re.sub(r'^Failed to construct dataset "\w+", builder_kwargs ".*?}": ', "", str(error).strip())
    return textwrap.shorten(text or type(error).__name__, 300)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the hints that TFDS logs (OpenCV would be faster and the like) from the user."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
