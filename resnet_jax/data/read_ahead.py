"""Compute what training needs next in worker processes, by grain, while the devices work."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import grain
import numpy as np
from absl import flags

from resnet_jax.data.processes import follow_parent
from resnet_jax.errors import CommandError
from resnet_jax.parallel.devices import cores

T = TypeVar("T")

_AHEAD = 2  # elements that each worker prepares


class ReadAhead(Generic[T]):
    """An iterator over what worker processes prepare; close it, or use it as a context manager, to end them."""

    def __init__(self, iterator: Any, make: Callable[..., T]):
        self._iterator, self._make = iterator, make

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """Return the next element.

        Raises:
          CommandError: a worker process was killed, or whatever it raises itself.
        """
        try:
            arrays = next(self._iterator)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise CommandError(
                "a worker process that reads images was killed: memory, or shared memory (/dev/shm; docker run"
                " --shm-size), may be short; take fewer --data.workers"
            ) from error
        # Copied from memory that is shared with a worker, so that it is given back now and not at the very end.
        return self._make(*(np.array(array) for array in arrays))

    def __enter__(self) -> ReadAhead[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes; a second call does nothing."""
        if self._iterator is None:
            return
        self._iterator.close()
        self._iterator = None
        gc.collect()  # grain's iterators are cycles, and hold the last element in shared memory


def read_ahead(dataset: grain.MapDataset, make: Callable[..., T], workers: int | None) -> ReadAhead[T]:
    """Compute the elements of `dataset` ahead, in order.

    Args:
      dataset: of elements that each take a while: tuples of arrays.
      make: called with the arrays of each element, in this process.
      workers: processes; None: one a core; 0: threads of this process.
    """
    workers = cores() if workers is None else workers
    if not flags.FLAGS.is_parsed():  # grain reads absl's flags, which this program does not use
        flags.FLAGS.mark_as_parsed()
    threads = 1 if workers else cores()
    elements = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD)
        elements = elements.mp_prefetch(options, worker_init_fn=_begin_worker)
    iterator = iter(elements)
    iterator.start_prefetch()  # while the caller prepares what it needs
    return ReadAhead(iterator, make)


def _begin_worker(index: int, count: int) -> None:
    del index, count
    follow_parent()
