"""Work through many images in several processes, with a progress bar where there is a terminal."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from resnet_jax.errors import CommandError

T = TypeVar("T")
R = TypeVar("R")

Advance = Callable[[int], None]
"""advance(images): tells how many more images are done."""


def run_tasks(
    function: Callable[[T, Advance], R], tasks: Sequence[T], *, workers: int, title: str, images: int, done: int = 0
) -> Iterator[R]:
    """Yield function(task, advance) of each task, in order.

    Args:
      function: can be pickled; each process gets it once, so what all tasks need belongs into it.
      tasks: small ones.
      workers: processes; 1 or less: this one.
      title: beside the progress bar.
      images: how many there are, for the progress bar.
      done: those of them that were done before.

    Raises:
      CommandError: a process was killed, or whatever the function raises.
    """
    with _progress_bar(title, images, done) as advance_to:
        if workers <= 1:
            counted = done

            def advance(images: int) -> None:
                nonlocal counted
                counted += images
                advance_to(counted)

            for task in tasks:
                yield function(task, advance)
            return
        context = multiprocessing.get_context("spawn")  # a fork would inherit JAX's threads in the middle of something
        count, stop = context.Value("q", done), context.Event()
        pool = futures.ProcessPoolExecutor(
            min(workers, len(tasks)) or 1, context, initializer=_begin, initargs=(function, count, stop)
        )
        try:
            waiting = collections.deque(pool.submit(_run, task) for task in tasks)
            while waiting:
                future = waiting.popleft()  # a future keeps its result
                while not futures.wait([future], timeout=0.2).done:
                    advance_to(count.value)
                yield future.result()
            advance_to(count.value)
        except BrokenProcessPool as error:
            raise CommandError(
                "a worker process was killed, perhaps as memory ran out: run it again with fewer --workers"
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _progress_bar(title: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a progress bar where there is a terminal; yield a function that is told how many are done."""
    columns = (TextColumn(title), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True, highlight=False)  # stdout is for the result
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(title, total=total, completed=done)
        yield lambda done: progress.update(bar, completed=done)


class _Stopped(Exception):
    """The command ends; nobody waits for this task's result."""


# Of a worker process: what _run calls. Set once, so that it need not travel with each task.
_function: Callable[[Any, Advance], Any]
_advance: Advance


def _begin(function: Callable[[Any, Advance], Any], count: Any, stop: Any) -> None:
    global _function, _advance
    follow_parent()

    def advance(images: int) -> None:
        with count.get_lock():
            count.value += images
        if stop.is_set():
            raise _Stopped

    _function, _advance = function, advance


def _run(task: Any) -> Any:
    return _function(task, _advance)


def follow_parent() -> None:
    """Make this worker process leave Ctrl-C to its parent, and end with it, also if that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
