"""Batches that grain's worker processes prepare ahead, while the devices work."""

from __future__ import annotations

import contextlib
import errno
import gc
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from resnet_jax.data.processes import follow_parent
from resnet_jax.data.types import HostBatch, TrainingData
from resnet_jax.errors import CommandError
from resnet_jax.parallel.devices import cores

_AHEAD = 2  # batches that each worker prepares


class Batches:
    """An iterator over batches; close it, or use it as a context manager, to end the worker processes."""

    def __init__(self, batches: grain.MapDataset, workers: int | None = None, kind: Callable[..., Any] = HostBatch):
        """Begin to compute batches, in order.

        Args:
          batches: tuples of arrays, as `kind` has them.
          workers: processes; None: one a core; 0: threads of this process.
          kind: what a batch is made of its arrays.
        """
        self._kind = kind
        workers = cores() if workers is None else workers
        if not flags.FLAGS.is_parsed():  # grain reads absl's flags, which this program does not use
            flags.FLAGS.mark_as_parsed()
        threads = 1 if workers else cores()
        elements = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        if workers:
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD)
            elements = elements.mp_prefetch(options, worker_init_fn=follow_parent)
        self._iterator: Any = iter(elements)
        self._iterator.start_prefetch()  # while the caller prepares what it needs

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """Return the next batch.

        Raises:
          CommandError: a worker process was killed, there is too little shared memory, or whatever a worker raises.
        """
        try:
            arrays = next(self._iterator)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise CommandError(
                "shared memory, through which worker processes hand over images, is full: make /dev/shm larger (docker"
                " run --shm-size 8g), take fewer --data.workers, or none with --data.workers 0"
            ) from error
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise CommandError(
                "a worker process that reads images was killed: memory, or shared memory (/dev/shm; docker run"
                " --shm-size), may be short; take fewer --data.workers"
            ) from error
        # Copied from memory that is shared with a worker, so that it is given back now and not at the very end.
        copies: list[Any] = [np.array(array) for array in arrays]
        return self._kind(*copies)

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes; a second call does nothing."""
        if self._iterator is None:
            return
        with contextlib.suppress(RuntimeError, OSError, EOFError):  # of a worker that was killed, which __next__ tells
            self._iterator.close()
        self._iterator = None
        gc.collect()  # grain's iterators are cycles, and hold the last batch in shared memory


class ReadAheadData(TrainingData):
    """Images that are read while it trains: each process reads the rows of the batches that lie on its own devices."""

    streamed = True

    def __init__(self, dataset: Any, by_image: jax.sharding.Sharding):
        """Take a data set, and how batches lie on the devices; nothing is read yet."""
        super().__init__(dataset)
        self._by_image = by_image
        self._batches: Batches | None = None
        self._named: set[tuple[str, int]] = set()
        self._unreadable: list[str] = []

    def unreadable(self) -> list[str]:
        names, self._unreadable = self._unreadable, []
        return names

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()

    def put(self, batch: Any, split: str) -> Any:
        """Note what could not be read, and lay this process's rows on its devices."""
        for index in map(int, batch.broken[batch.broken >= 0]):
            if (split, index) not in self._named:
                self._named.add((split, index))
                name = "training" if split == "train" else split
                self._unreadable.append(f"{name} image {self.splits[split].id(index)}")
        return type(batch)(*(jax.make_array_from_process_local_data(self._by_image, array) for array in batch))
