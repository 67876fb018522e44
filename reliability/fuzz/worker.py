"""The process of the fuzzer in which files are read: whatever they do, it is done to this process only."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import os
import shutil
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from reliability.fuzz.reader import Damaged, Files, Reader


class Task(NamedTuple):
    """Cases `first`, `first + step`, ... below `stop` of a reader."""

    reader: str
    first: int
    step: int
    stop: int


class Lines(NamedTuple):
    """Of a module: how many can be executed, and those that were."""

    all: frozenset[int]
    executed: frozenset[int]


def work(connection: Connection, module: str, tasks: list[Task], seed: int, limits: Any, folder: Path) -> None:
    """Run tasks and send what comes of each case, then the coverage of each task's modules.

    Args:
      connection: gets ("begin",), ("case", reader, number, Outcome), ("coverage", reader, {file: Lines}), or ("error",
        traceback).
      module: that has READERS.
      tasks: what to do.
      seed: of all damage.
      limits: of a case.
      folder: for the files of the case at hand, which stay there if the process dies.
    """
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # libtiff and others write to these by themselves
        os.dup2(silent, stream)
    try:
        _work(connection, module, tasks, seed, limits, folder)
    except Exception:  # of the fuzzer itself
        connection.send(("error", traceback.format_exc()))
        raise


def _work(connection: Connection, module: str, tasks: list[Task], seed: int, limits: Any, folder: Path) -> None:
    import coverage

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    warnings.simplefilter("ignore")
    package = importlib.util.find_spec("resnet_jax")
    assert package is not None
    folders = list(package.submodule_search_locations or ())
    measured = coverage.Coverage(data_file=None, config_file=False, source_dirs=folders)
    measured.start()
    measured.switch_context("import")
    from reliability.fuzz.case import damaged_files, forget_peak, limit_memory, run_case

    readers: dict[str, Reader] = importlib.import_module(module).READERS
    for task in tasks:
        reader = readers[task.reader]
        measured.switch_context(reader.name)
        valid = reader.make()
        reader.prepare()
        here = folder / reader.name
        write(here, valid)
        reader.read(here, frozenset(valid))  # valid files are read, and what is imported late is imported
        gc.collect()
        limit_memory(limits)
        connection.send(("begin",))
        for number in range(task.first, task.stop, task.step):
            damaged = damaged_files(reader, valid, seed, number)
            forget_peak()
            with changed(here, valid, damaged):
                outcome = run_case(reader, here, damaged, limits)
            connection.send(("case", reader.name, number, outcome))
        shutil.rmtree(here)
        connection.send(("coverage", reader.name, _lines(measured, reader)))


def write(folder: Path, files: Files) -> None:
    """Write files below a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@contextlib.contextmanager
def changed(folder: Path, valid: Files, damaged: Damaged) -> Iterator[None]:
    """Have damaged files below `folder`; afterwards the valid ones."""
    gone = [name for name, content in damaged.items() if content is None]
    for name in gone:
        (folder / name).unlink()
    write(folder, {name: content for name, content in damaged.items() if content is not None})
    yield
    for name in damaged.keys() - valid.keys():
        (folder / name).unlink(missing_ok=True)
    write(folder, {name: valid[name] for name in damaged if name in valid})


def _lines(measured: Any, reader: Reader) -> dict[str, Lines]:
    """Return the lines of the reader's modules that its cases, or importing them, have executed."""
    data = measured.get_data()
    data.set_query_contexts(["^import$", f"^{reader.name}$"])
    found = {}
    for module in reader.modules:
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        _, statements, *_ = measured.analysis2(spec.origin)
        found[spec.origin] = Lines(frozenset(statements), frozenset(statements) & set(data.lines(spec.origin) or ()))
    return found
