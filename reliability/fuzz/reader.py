"""What the fuzzer needs to know of a reader."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

Files = dict[str, bytes]  # by their paths below the folder of a case
Damaged = dict[str, bytes | None]  # those that differ; None: it is deleted


@dataclasses.dataclass(frozen=True)
class Reader:
    """A way in which users' files get into the program.

    Attributes:
      name: of the reader.
      share: of all cases, in proportion to the shares of the other readers.
      modules: whose lines it is to reach.
      make: makes valid files.
      damage: damage(rng, files) returns those that are different in a case.
      read: read(folder, names) reads what is there, by the calls that commands make, and asserts what must hold of it;
        `names` are those of the damaged files.
      prepare: is called once in a process, before the first case.
      needs: a package that has to be installed.
    """

    name: str
    share: int
    modules: tuple[str, ...]
    make: Callable[[], Files]
    damage: Callable[[random.Random, Files], Damaged]
    read: Callable[[Path, frozenset[str]], None]
    prepare: Callable[[], None] = lambda: None
    needs: str | None = None
