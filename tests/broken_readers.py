"""Readers with every fault that the fuzzer has to notice, and one that has none."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from reliability.fuzz.reader import Damaged, Files, Reader
from resnet_jax.errors import UserError


def _files() -> Files:
    return {"file.json": b'{"number": 1}'}


def _damage(rng: random.Random, files: Files) -> Damaged:
    return {"file.json": b"damaged %d" % rng.randrange(10**6)}


def _reader(name: str, on_damage: Callable[[Path], object]) -> Reader:
    def read(folder: Path, names: frozenset[str]) -> None:
        path = folder / "file.json"
        if path.read_bytes() != _files()["file.json"]:
            on_damage(path)

    return Reader(name, 1, ("resnet_jax.files",), _files, _damage, read)


def _refuse(path: Path) -> None:
    raise UserError(f"{path}: damaged")


def _refuse_without_name(path: Path) -> None:
    raise UserError("damaged")


def _key_error(path: Path) -> None:
    json.loads('{"a": 1}')["b"]


def _hang(path: Path) -> None:
    while True:
        time.sleep(0.01)


def _swallow(path: Path) -> None:
    """Hang inside of what handles all errors of a library."""
    try:
        _hang(path)
    except Exception as error:
        raise UserError(f"{path}: damaged") from error


def _fill_memory(path: Path) -> None:
    np.ones(64 << 17)  # 64 MiB


def _want_too_much(path: Path) -> None:
    """Refuse for want of memory: where there is more of it, it would have been filled."""
    try:
        np.zeros(1 << 45, np.uint8)
    except MemoryError as error:
        raise UserError(f"{path}: damaged") from error


def _die(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _deaf(path: Path) -> None:
    """Hang in C, where Python does not look for signals."""
    sum(range(10**13))


def _assert(path: Path) -> None:
    raise AssertionError("labels out of range")


READERS = {
    reader.name: reader
    for reader in (
        _reader("sound", _refuse),
        _reader("nameless", _refuse_without_name),
        _reader("key-error", _key_error),
        _reader("wrong-result", _assert),
        _reader("hangs", _hang),
        _reader("hangs-in-except", _swallow),
        _reader("deaf", _deaf),
        _reader("memory", _fill_memory),
        _reader("memory-error", _want_too_much),
        _reader("dies", _die),
    )
}
