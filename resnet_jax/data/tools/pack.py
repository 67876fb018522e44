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
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resnet_jax.data.decode import BrokenImageError
from resnet_jax.data.processes import Advance, run_tasks
from resnet_jax.data.sources.image_folder import ImageFolder, list_train, list_val
from resnet_jax.data.sources.names import Names
from resnet_jax.data.sources.packed import MANIFEST, Manifest, PackedSplit, Shard, is_packed, open_split, read_manifest
from resnet_jax.data.sources.shards import sha256_of, write_shard
from resnet_jax.data.tools.reencode import PackOptions, reencode
from resnet_jax.errors import UserError
from resnet_jax.files import atomic_write

PLAN = "plan.json"  # of a packing that is not complete
_SHARD_IMAGES = 1024
_MOST_SHARDS = 256  # of a split: each is a file that is open in every process that reads


class _Task(NamedTuple):
    split: str
    file: str
    start: int  # of the images
    stop: int


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
    splits = {"train": train, "val": list_val(source, class_names)}
    tasks = [task for name, images in splits.items() for task in _divide(name, len(images), shard_images)]
    plan = {
        "options": dataclasses.asdict(options),
        "source": {name: _fingerprint(images, class_names) for name, images in splits.items()},
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {error.strerror}") from error
    with _alone(out):
        complete = is_packed(out)
        if complete:
            manifest = _check_complete(out, plan)
        else:
            _begin(out, {**plan, "shards": [task.stop for task in tasks]})
            _write_shards(_WriteShard(out, splits, options), tasks, workers)
            packed = {name: _write_index(out, name, images, tasks) for name, images in splits.items()}
            manifest = Manifest(class_names, plan["options"], plan["source"], packed)
            with atomic_write(out / MANIFEST) as partial:
                partial.write_text(manifest.to_json())
        for path in [out / PLAN, *(_sidecar(out, task) for task in tasks)]:
            path.unlink(missing_ok=True)
    return manifest, complete


def _divide(split: str, images: int, shard_images: int | None) -> list[_Task]:
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
        with contextlib.suppress(OSError):  # a file system without locks
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
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): delete {out} and pack again") from error
    _check_same(out, found, plan)


def _check_complete(out: Path, plan: dict[str, Any]) -> Manifest:
    manifest = read_manifest(out)
    _check_same(out, {"options": manifest.options, "source": manifest.source}, plan)
    for name in manifest.splits:
        open_split(out, manifest, name)
    return manifest


def _check_same(out: Path, found: dict[str, Any], plan: dict[str, Any]) -> None:
    for key, what in (("source", "of other images"), ("options", "with other options"), ("shards", "in other shards")):
        if found.get(key) != plan.get(key):
            raise UserError(f"{out} holds a packing {what}: choose another folder or delete this one")


def _sidecar(out: Path, task: _Task) -> Path:
    return out / f"{task.file}.json"


def _is_written(out: Path, task: _Task) -> bool:
    try:
        return json.loads(_sidecar(out, task).read_text())["bytes"] == (out / task.file).stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_shards(write: _WriteShard, tasks: list[_Task], workers: int) -> None:
    left = [task for task in tasks if not _is_written(write.out, task)]
    images = sum(task.stop - task.start for task in tasks)
    done = images - sum(task.stop - task.start for task in left)
    for _ in run_tasks(write, left, workers=workers, title="images", images=images, done=done):
        pass


@dataclasses.dataclass(frozen=True)
class _WriteShard:
    out: Path
    splits: dict[str, ImageFolder]
    options: PackOptions

    def __call__(self, task: _Task, advance: Advance) -> None:
        """Write a shard and, when it is complete, its sidecar."""
        images = self.splits[task.split]
        crc32: list[int] = []
        skipped: list[tuple[int, str]] = []

        def records() -> Iterator[bytes]:
            for index in range(task.start, task.stop):
                try:
                    record = reencode(images.read(index)[0], self.options)
                except BrokenImageError as error:
                    skipped.append((index, str(error)))
                else:
                    crc32.append(zlib.crc32(record))
                    yield record
                advance(1)

        path = self.out / task.file
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about metadata that is left out here
            with atomic_write(path) as partial:
                write_shard(partial, records())
        described = {"bytes": path.stat().st_size, "sha256": sha256_of(path), "crc32": crc32, "skipped": skipped}
        with atomic_write(_sidecar(self.out, task)) as partial:
            partial.write_text(json.dumps(described) + "\n")


def _write_index(out: Path, split: str, images: ImageFolder, tasks: list[_Task]) -> PackedSplit:
    shards: list[Shard] = []
    crc32: list[np.ndarray] = []
    skipped: list[tuple[int, str]] = []
    for task in tasks:
        if task.split == split:
            described = json.loads(_sidecar(out, task).read_text())
            crc32.append(np.array(described["crc32"], np.uint32))
            skipped += described["skipped"]
            shards.append(Shard(task.file, len(crc32[-1]), described["bytes"], described["sha256"]))
    kept = np.delete(np.arange(len(images)), [index for index, _ in skipped])
    if not len(kept):
        raise UserError(f"none of the {len(images)} images in {images.root} can be read: {skipped[0][1]}")
    path = out / f"{split}.index.npz"
    names = _take(images.names, kept)
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.savez(
            file,
            labels=images.labels[kept],
            blob=names.blob,
            offsets=names.offsets,
            crc32=np.concatenate(crc32),
        )
    left_out = tuple((images.id(index), reason) for index, reason in skipped)
    return PackedSplit(len(kept), tuple(shards), path.name, sha256_of(path), left_out)


def _take(names: Names, indices: np.ndarray) -> Names:
    lengths = np.diff(names.offsets)
    offsets = np.concatenate([[0], np.cumsum(lengths[indices])])
    kept = np.zeros(len(names), bool)
    kept[indices] = True
    return Names(names.blob[np.repeat(kept, lengths)], offsets)
