"""What lies in WORKDIR/checkpoints: which steps, whether their files are as they were written, what is noted of them.

Each checkpoint has the SHA-256 of its files, written before the rename that makes it valid and compared before it is
read.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

from resnet_jax.errors import StorageError, UserError, reason
from resnet_jax.files import atomic_write, read_json

CHECKSUMS = "checksums.json"  # of a checkpoint's files, in its folder
METADATA = "_CHECKPOINT_METADATA"  # orbax writes the time of the commit into it, after our checksums
LAST = "last_checkpoint"  # a file beside the folder: what was saved is missed if the folder is lost
VALIDATION_ERROR, EVALUATED = "validation_error", "evaluated"  # what is noted of a checkpoint
_ACCEPT = "python -m resnet_jax checkpoints WORKDIR --accept STEP"


def directory(workdir: Path) -> Path:
    """Return where the checkpoints of a work directory lie."""
    return (workdir / "checkpoints").absolute()


def folder_of(workdir: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return directory(workdir) / str(step)


def saved_steps(workdir: Path) -> list[int]:
    """Return the steps with a checkpoint, ascending, damaged ones among them."""
    return sorted(int(name) for name in _names(workdir) if re.fullmatch("0|[1-9][0-9]*", name))


def unfinished(workdir: Path) -> list[str]:
    """Return the names of what was being saved when a run ended, or is being saved now."""
    return sorted(name for name in _names(workdir) if "orbax-checkpoint-tmp" in name)


def _names(workdir: Path) -> list[str]:
    try:
        return os.listdir(directory(workdir))
    except FileNotFoundError:
        return []


class Damage(NamedTuple):
    """What is wrong with a checkpoint.

    Attributes:
      missing: files that are gone.
      changed: files with other contents.
    """

    missing: list[str]
    changed: list[str]

    def __str__(self) -> str:
        name, verb = (self.changed[0], "has changed") if self.changed else (self.missing[0], "is missing")
        others = len(self.changed) + len(self.missing) - 1
        return f"{name} {verb}" + (f", and {others} more files" if others else "")


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of all files, which are on the disk then: a power cut after it loses none of them."""
    files = _files(folder).items()
    checksums = {name: _sha256(path, sync=True) for name, path in files if name not in (CHECKSUMS, METADATA)}
    with (folder / CHECKSUMS).open("w") as file:
        file.write(json.dumps(checksums, indent=0) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _files(folder: Path) -> dict[str, Path]:
    """Return the regular files of a folder by their names in it; links do not count."""
    paths = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    files = sorted(path for path in paths if path.is_file() and not path.is_symlink())
    return {path.relative_to(folder).as_posix(): path for path in files}


def _sha256(path: Path, *, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(workdir: Path, step: int) -> Damage | None:
    """Compare the files of a checkpoint with their checksums, reading all of them; None if it is intact."""
    folder = folder_of(workdir, step)
    files = _files(folder)
    if CHECKSUMS not in files:
        return Damage([CHECKSUMS], [])
    try:
        checksums = dict(read_json(files[CHECKSUMS]))
        # Only files that are in the folder are opened, whatever the names are.
        changed = [name for name, path in files.items() if name in checksums and _sha256(path) != checksums[name]]
    except (OSError, ValueError, TypeError):
        return Damage([], [CHECKSUMS])
    changed += [] if checksums else [CHECKSUMS]
    changed += [METADATA] if METADATA in files and _read_metadata(folder) is None else []
    missing = [name for name in (*checksums, METADATA) if name not in files]
    return Damage(missing, changed) if missing or changed else None


def accept(workdir: Path, step: int) -> None:
    """Give a checkpoint the checksums of its files as they are now.

    Raises:
      UserError: there is no such checkpoint.
      StorageError: they cannot be written.
    """
    _check_saved(workdir, step)
    try:
        write_checksums(folder_of(workdir, step))
    except OSError as error:
        raise StorageError(f"cannot write checksums of step {step} in {workdir}: {reason(error)}") from error


def _check_saved(workdir: Path, step: int) -> None:
    if step not in saved_steps(workdir):
        saved = ", ".join(map(str, saved_steps(workdir))) or "none"
        raise UserError(f"{directory(workdir)} has no checkpoint of step {step}; there are: {saved}")


def was_evaluated(workdir: Path, step: int) -> bool:
    """Tell whether the evaluation due after a saved step was made: not if a signal stopped the run there."""
    metadata = _read_metadata(folder_of(workdir, step))
    return metadata is None or metadata["custom_metadata"].get(EVALUATED, True)


def mark_evaluated(workdir: Path, step: int) -> None:
    """Note that the evaluation which was_evaluated() missed has been made."""
    folder = folder_of(workdir, step)
    metadata = _read_metadata(folder)
    if metadata is not None:
        metadata["custom_metadata"][EVALUATED] = True
        with atomic_write(folder / METADATA) as partial:
            partial.write_text(json.dumps(metadata))


def _read_metadata(folder: Path) -> dict[str, Any] | None:
    """Return what orbax notes of a checkpoint, or None if that is damaged."""
    try:
        metadata = read_json(folder / METADATA)
        return metadata if isinstance(metadata["custom_metadata"], dict) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def best_step(workdir: Path) -> int | None:
    """Return the last saved step of the lowest validation error, or None without a validation split."""
    errors = {step: _validation_error(workdir, step) for step in saved_steps(workdir)}
    known = {step: error for step, error in errors.items() if error is not None}
    return min(known, key=lambda step: (known[step], -step), default=None)


def _validation_error(workdir: Path, step: int) -> float | None:
    """Return the validation error in %, if it was noted and can be read."""
    try:
        return float(read_json(folder_of(workdir, step) / "metrics" / "metrics")[VALIDATION_ERROR])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _verify_all(workdir: Path) -> tuple[list[int], dict[int, Damage]]:
    """Return the intact steps, ascending, and what is wrong with the others."""
    found = {step: verify(workdir, step) for step in saved_steps(workdir)}
    intact = [step for step, damage in found.items() if damage is None]
    # A run that goes on may have removed one while it was read.
    return intact, {step: damage for step, damage in found.items() if damage and folder_of(workdir, step).is_dir()}


def recover(workdir: Path) -> list[str]:
    """Move damaged checkpoints to WORKDIR/damaged, so that the newest intact one is the last.

    Returns:
      What a user should know of it, a line each.

    Raises:
      UserError: none is intact, or those that were saved are gone; nothing was moved.
      StorageError: they cannot be moved.
    """
    intact, damaged = _verify_all(workdir)
    if damaged and not intact:
        raise UserError(_none_intact(workdir, damaged))
    last = _last_saved(workdir)
    if last is not None and not intact:
        raise UserError(
            f"{directory(workdir)} is empty, but a checkpoint of step {last} was saved there: copy it back from"
            f" elsewhere, or delete {workdir} to begin again"
        )
    done = []
    if last is not None and last > max([*intact, *damaged]):
        done.append(f"the checkpoint of step {last} is gone from {directory(workdir)}")
    try:
        for step, damage in damaged.items():
            folder, aside = folder_of(workdir, step), workdir / "damaged" / str(step)
            if step < intact[-1] and not damage.changed and CHECKSUMS not in damage.missing:
                shutil.rmtree(folder)  # a run was killed while it was removing this one
                continue
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            folder.rename(aside)
            done.append(f"the checkpoint of step {step} is damaged ({damage}): moved to {aside}")
    except OSError as error:
        raise StorageError(f"cannot move a damaged checkpoint out of {directory(workdir)}: {reason(error)}") from error
    return done


def _last_saved(workdir: Path) -> int | None:
    """Return the last step that was ever saved; None if none was, or nothing says so."""
    try:
        return int((workdir / LAST).read_text())
    except (OSError, ValueError):
        return None


def _none_intact(workdir: Path, damaged: dict[int, Damage]) -> str:
    faults = "; ".join(f"step {step}: {damage}" for step, damage in damaged.items())
    accept = f", or if only checksums are missing: {_ACCEPT}" if _without_checksums(damaged) else ""
    return f"no checkpoint in {directory(workdir)} is intact ({faults}): copy one back from elsewhere{accept}"


def _without_checksums(damaged: dict[int, Damage]) -> bool:
    return any(CHECKSUMS in damage.missing for damage in damaged.values())


def intact_step(workdir: Path, step: int | None = None) -> int:
    """Return `step`, or that of the newest intact checkpoint; a warning names the newer ones.

    Raises:
      UserError: there is none, or it is damaged.
    """
    steps = saved_steps(workdir)
    if not steps:
        raise UserError(f"{directory(workdir)} holds no checkpoint yet")
    if step is not None:
        _check_saved(workdir, step)
    damaged: dict[int, Damage] = {}
    for candidate in reversed(steps) if step is None else [step]:
        damage = verify(workdir, candidate)
        if damage is None:
            for other, fault in damaged.items():
                message = f"the checkpoint of step {other} is damaged ({fault}): using step {candidate}"
                print(f"warning: {message}", file=sys.stderr)
            return candidate
        damaged[candidate] = damage
    if saved_steps(workdir) != steps:  # a run that goes on has removed what we were reading
        return intact_step(workdir, step)
    if step is None:
        raise UserError(_none_intact(workdir, damaged))
    raise UserError(f"the checkpoint of step {step} in {directory(workdir)} is damaged: {damaged[step]}")


def describe(workdir: Path) -> tuple[str, bool]:
    """Return a table of all checkpoints, verified, and whether one is damaged."""
    intact, damaged = _verify_all(workdir)
    last, best = max(intact, default=None), best_step(workdir)
    lines = [f"{'step':>9}  {'saved':19}  {'MB':>8}  {'validation':>10}  state"]
    for step in sorted([*intact, *damaged]):
        folder = folder_of(workdir, step)
        written = folder / METADATA  # the last of its files
        at = datetime.datetime.fromtimestamp((written if written.exists() else folder).stat().st_mtime)
        size = sum(file.stat().st_size for file in _files(folder).values()) / 1e6
        error = _validation_error(workdir, step)
        validation = "" if error is None else f"{error:.2f} %"
        state = f"damaged: {damaged[step]}" if step in damaged else "intact"
        state += ", the last" * (step == last) + ", the best" * (step == best)
        lines.append(f"{step:9}  {at:%F %T}  {size:8.1f}  {validation:>10}  {state}")
    if not intact and not damaged:
        lines = [f"{directory(workdir)} holds no checkpoint"]
    if _without_checksums(damaged):
        lines.append(f"one without checksums.json may be of a version that wrote none: {_ACCEPT} writes them")
    lines += [f"{name}: being saved, or left by a run that ended then" for name in unfinished(workdir)]
    return "\n".join(lines), bool(damaged)
