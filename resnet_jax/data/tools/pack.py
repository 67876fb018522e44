"""Pack a folder of images into a few large files, once: what packed.py reads.

Each shard is written by one process and then described by a file beside it, so that a run that is killed goes on where
it was. manifest.json is written last: without it nothing counts as packed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from resnet_jax.data.decode import BrokenImageError
from resnet_jax.data.processes import Advance, run_tasks
from resnet_jax.data.sources.image_folder import ImageFolder, list_train, list_val
from resnet_jax.data.sources.packed import (
    FORMAT,
    MANIFEST,
    Manifest,
    PackedSplit,
    Shard,
    SplitName,
    is_packed,
    open_split,
    read_manifest,
)
from resnet_jax.data.sources.shards import sha256_of, write_shard
from resnet_jax.data.tools.reencode import PackOptions, reencode
from resnet_jax.errors import UserError, reason
from resnet_jax.files import atomic_write, read_json

PLAN = "plan.json"  # of a packing that is not complete
_SHARD_IMAGES = 1024
_MOST_SHARDS = 256  # of a split: each is a file that is open in every process that reads


class _Task(NamedTuple):
    """A shard to write, of the images start, ..., stop - 1."""

    split: SplitName
    file: str
    start: int
    stop: int


class _Written(NamedTuple):
    """What stands beside a shard that is complete; `skipped` are the numbers of images, and why."""

    bytes: int
    sha256: str
    skipped: list[tuple[int, str]]


def pack(
    source: Path, out: Path, options: PackOptions, *, workers: int = 1, shard_images: int | None = None
) -> tuple[Manifest, bool]:
    """Pack the images of a folder, in the order in which they would be read from it.

    Args:
      source: the folder that holds train/ and val/.
      out: folder to write; one that holds a part of the same packing is completed.
      options: how.
      workers: processes.
      shard_images: in each file; None: 1024, or as many as make 256 files.

    Returns:
      What is packed, and whether all of it was there before.

    Raises:
      UserError: the folder cannot be read, `out` holds something else or cannot be written, or nothing can be decoded.
    """
    if is_packed(source):
        raise UserError(f"{source} is packed already: pack the folder that holds train/CLASS/FILE and val/")
    train, class_names = list_train(source)
    splits: dict[SplitName, ImageFolder] = {"train": train, "val": list_val(source, class_names)}
    tasks = [task for name, images in splits.items() for task in _divide(name, len(images), shard_images)]
    plan: dict[str, Any] = {
        # Without what an older version did not have, so that its packings are still the same.
        "options": {name: value for name, value in vars(options).items() if (name, value) != ("upright", False)},
        "source": {name: _fingerprint(images, class_names) for name, images in splits.items()},
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {reason(error)}") from error
    with _alone(out):
        complete = is_packed(out)
        if complete:
            manifest = read_manifest(out)
            _check_same(out, vars(manifest), plan)
            for name in manifest.splits:
                open_split(out, manifest, name)
        else:
            _begin(out, {**plan, "shards": [task.stop for task in tasks]})
            _write_shards(_WriteShard(out, splits, options), tasks, workers)
            packed = {name: _write_index(out, name, images, tasks) for name, images in splits.items()}
            manifest = Manifest(class_names, plan["options"], plan["source"], packed, FORMAT)
            with atomic_write(out / MANIFEST) as partial:
                partial.write_bytes(TypeAdapter(Manifest).dump_json(manifest, indent=1) + b"\n")
        for path in [out / PLAN, *(_sidecar(out, task) for task in tasks)]:
            path.unlink(missing_ok=True)
    return manifest, complete


def _divide(split: SplitName, images: int, shard_images: int | None) -> list[_Task]:
    size = shard_images or max(_SHARD_IMAGES, -(-images // _MOST_SHARDS))
    starts = range(0, images, size)
    names = [f"{split}-{number:05d}-of-{len(starts):05d}.array_record" for number in range(len(starts))]
    return [_Task(split, name, start, min(start + size, images)) for name, start in zip(names, starts, strict=True)]


def _fingerprint(images: ImageFolder, class_names: tuple[str, ...]) -> str:
    digest = hashlib.sha256(json.dumps(class_names).encode())
    for array in (images.names.blob, images.names.offsets, images.labels):
        digest.update(array.tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep a second run away from the folder."""
    folder = os.open(out, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # of a file system without locks
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{out}: another run is packing into this folder") from error
        yield
    finally:
        os.close(folder)


def _begin(out: Path, plan: dict[str, Any]) -> None:
    """Check that the folder is empty, or holds a part of the same packing."""
    path = out / PLAN
    if not path.exists():
        if {file.name for file in out.iterdir()} - {f"{PLAN}.new"}:  # left by a run that was killed here
            raise UserError(f"{out} holds other files: choose a folder that is empty or not there")
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(plan) + "\n")
        return
    try:
        found = dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path} ({reason(error)}): delete {out} and pack again") from error
    _check_same(out, found, plan)


def _check_same(out: Path, found: dict[str, Any], plan: dict[str, Any]) -> None:
    for key, what in (("source", "of other images"), ("options", "with other options"), ("shards", "in other shards")):
        if key in plan and found.get(key) != plan[key]:
            raise UserError(f"{out} holds a packing {what}: choose another folder or delete this one")


def _sidecar(out: Path, task: _Task) -> Path:
    return out / f"{task.file}.json"


def _read_sidecar(out: Path, task: _Task) -> _Written:
    content = read_json(_sidecar(out, task))
    return _Written(content["bytes"], content["sha256"], content["skipped"])


def _is_written(out: Path, task: _Task) -> bool:
    try:
        return _read_sidecar(out, task).bytes == (out / task.file).stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_shards(write: _WriteShard, tasks: list[_Task], workers: int) -> None:
    left = [task for task in tasks if not _is_written(write.out, task)]
    images = sum(task.stop - task.start for task in tasks)
    done = images - sum(task.stop - task.start for task in left)
    for _ in run_tasks(write, left, workers=workers, images=images, done=done):
        pass


@dataclasses.dataclass(frozen=True)
class _WriteShard:
    out: Path
    splits: dict[SplitName, ImageFolder]
    options: PackOptions

    def __call__(self, task: _Task, advance: Advance) -> None:
        """Write a shard and, when it is complete, its sidecar."""
        skipped: list[tuple[int, str]] = []

        def records() -> Iterator[bytes]:
            for index in range(task.start, task.stop):
                try:
                    yield reencode(self.splits[task.split].read(index)[0], self.options)
                except BrokenImageError as error:
                    skipped.append((index, str(error)))
                advance(1)

        path = self.out / task.file
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about metadata that is left out here
            with atomic_write(path) as partial:
                write_shard(partial, records())
        written = _Written(path.stat().st_size, sha256_of(path), skipped)
        with atomic_write(_sidecar(self.out, task)) as partial:
            partial.write_text(json.dumps(written._asdict()) + "\n")


def _write_index(out: Path, split: str, images: ImageFolder, tasks: list[_Task]) -> PackedSplit:
    shards: list[Shard] = []
    skipped: list[tuple[int, str]] = []
    for task in tasks:
        if task.split == split:
            written = _read_sidecar(out, task)
            count = task.stop - task.start - len(written.skipped)
            shards.append(Shard(task.file, count, written.bytes, written.sha256))
            skipped += written.skipped
    kept = np.ones(len(images), bool)
    kept[[index for index, _ in skipped]] = False
    if not kept.any():
        raise UserError(f"none of the {len(images)} images in {images.root} can be read: {skipped[0][1]}")
    path = out / f"{split}.index.npz"
    names = images.names.select(kept)
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.savez(file, labels=images.labels[kept], blob=names.blob, offsets=names.offsets)
    left_out = tuple((images.id(index), why) for index, why in skipped)
    return PackedSplit(int(kept.sum()), tuple(shards), path.name, sha256_of(path), left_out)
