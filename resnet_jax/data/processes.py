"""Work through many images in several processes, with a progress bar where there is a terminal."""

from __future__ import annotations

import collections
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from resnet_jax.errors import CommandError, UserError

T = TypeVar("T")
R = TypeVar("R")

Advance = Callable[[int], None]
"""advance(images): tells how many more images are done."""


def make_progress() -> Progress:
    """Return a bar that counts images, on a terminal; elsewhere nothing is shown."""
    columns = (TextColumn("images"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True, highlight=False)  # stdout is for the result
    return Progress(*columns, console=console, disable=not console.is_terminal)


def run_tasks(
    function: Callable[[T, Advance], R], tasks: Sequence[T], *, workers: int, images: int, done: int = 0
) -> Iterator[R]:
    """Yield function(task, advance) of each task, in order.

    Args:
      function: can be pickled; each process gets it once, so what all tasks need belongs into it.
      tasks: small ones.
      workers: processes; 1 or less: this one.
      images: how many there are, for the progress bar.
      done: those of them that were done before.

    Raises:
      CommandError: a process was killed, or whatever the function raises.
    """
    with make_progress() as progress:
        bar = progress.add_task("images", total=images, completed=done)
        if workers <= 1:
            for task in tasks:
                yield function(task, partial(progress.advance, bar))
            return
        check_main_guard()
        context = multiprocessing.get_context("spawn")  # a fork would inherit JAX's threads in the middle of something
        count, stop = context.Value("q", done), context.Event()
        pool = futures.ProcessPoolExecutor(
            min(workers, len(tasks)) or 1, context, initializer=_Worker.begin, initargs=(function, count, stop)
        )
        try:
            waiting = collections.deque(pool.submit(_Worker.run, task) for task in tasks)
            while waiting:
                future = waiting.popleft()  # a future keeps its result
                while not futures.wait([future], timeout=0.2).done:
                    progress.update(bar, completed=count.value)
                yield future.result()
            progress.update(bar, completed=count.value)
        except BrokenProcessPool as error:
            raise CommandError(
                "a worker process was killed, perhaps as memory ran out: run it again with fewer --workers"
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def check_main_guard() -> None:
    """Check that the script which runs does nothing when a worker process imports it, as Python has them do.

    Raises:
      UserError: each process would begin anew what this one does.
    """
    path = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    try:
        guarded = "__name__" in path.read_text(errors="replace")
    except OSError:  # a notebook or a prompt, which is not imported
        return
    if not guarded:
        raise UserError(
            f"worker processes would run {path} anew: put what it does into a function, and call"
            ' that below if __name__ == "__main__": (or take no workers)'
        )


class _Stopped(Exception):
    """The command ends; nobody waits for this task's result."""


class _Worker:
    """What a worker process has: set once, as the function need not travel with each task, and the others cannot."""

    function: Callable[[Any, Advance], Any]
    count: Any  # of images done, shared by all processes
    stop: Any  # an event: the command ends

    @classmethod
    def begin(cls, function: Callable[[Any, Advance], Any], count: Any, stop: Any) -> None:
        follow_parent()
        cls.function, cls.count, cls.stop = staticmethod(function), count, stop

    @classmethod
    def run(cls, task: Any) -> Any:
        return cls.function(task, cls.advance)

    @classmethod
    def advance(cls, images: int) -> None:
        with cls.count.get_lock():
            cls.count.value += images
        if cls.stop.is_set():
            raise _Stopped


def follow_parent(*_: int) -> None:
    """Make this worker process (grain says which) leave Ctrl-C to its parent, and end with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
