"""Many file names in little memory."""

from __future__ import annotations

import dataclasses
import os
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from resnet_jax.errors import printable


@dataclasses.dataclass(frozen=True)
class Names:
    """Names one behind the other: a million Python strings would be a hundred megabytes, and as many objects.

    Attributes:
      blob: [bytes] uint8, the names as the file system has them (they need not be UTF-8).
      offsets: [N + 1] int64, where each begins in `blob`; the last one is its length.
    """

    blob: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int, /) -> bytes:
        return self.blob[self.offsets[index] : self.offsets[index + 1]].tobytes()

    def text(self, index: int) -> str:
        """Return a name that can be printed."""
        return printable(os.fsdecode(self[index]))

    def path(self, folder: Path, index: int) -> Path:
        """Return the file of that name."""
        return folder / os.fsdecode(self[index])

    def select(self, chosen: np.ndarray) -> Names:
        """Return the names for which `chosen` [N] is True."""
        lengths = np.diff(self.offsets)
        offsets = np.concatenate([[0], np.cumsum(lengths[chosen])])
        return Names(self.blob[np.repeat(chosen, lengths)], offsets)


def index_names(entries: Iterable[tuple[int, str]]) -> tuple[Names, np.ndarray]:
    """Return the names and labels (int32) of (label, name) pairs, in their order; none of the pairs is kept."""
    blob, offsets, labels = bytearray(), array("q", [0]), array("i")
    for label, name in entries:
        blob += os.fsencode(name)
        offsets.append(len(blob))
        labels.append(label)
    names = Names(np.frombuffer(blob, np.uint8), np.frombuffer(offsets, np.int64))
    return names, np.frombuffer(labels, np.int32)
