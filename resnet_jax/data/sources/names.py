"""Many file names in little memory."""

from __future__ import annotations

import dataclasses
import os

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

    def __getitem__(self, index: int, /) -> bytes:
        return self.blob[self.offsets[index] : self.offsets[index + 1]].tobytes()

    def text(self, index: int) -> str:
        """Return a name that can be printed."""
        return printable(os.fsdecode(self[index]))

    def select(self, chosen: np.ndarray) -> Names:
        """Return the names for which `chosen` [N] is True."""
        lengths = np.diff(self.offsets)
        offsets = np.concatenate([[0], np.cumsum(lengths[chosen])])
        return Names(self.blob[np.repeat(chosen, lengths)], offsets)
