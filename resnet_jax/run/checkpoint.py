"""Checkpoints of the whole training state with orbax: written in the background, complete or not there at all.

They hold every block by its name, also those of a network with scan_blocks: one may be trained on as the other. Each
has the SHA-256 of its files, written before the rename that makes it valid and compared before it is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from resnet_jax.errors import StorageError, UserError, reason
from resnet_jax.files import atomic_write, read_json
from resnet_jax.models.stacking import is_stacked, stack_blocks, unstack_blocks

CHECKSUMS = "checksums.json"  # of a checkpoint's files, in its folder
METADATA = "_CHECKPOINT_METADATA"  # orbax writes the time of the commit into it, after our checksums
LAST = "last_checkpoint"  # a file beside the folder: what was saved is missed if the folder is lost
VALIDATION_ERROR, EVALUATED = "validation_error", "evaluated"  # what is noted of a checkpoint
_ACCEPT = "python -m resnet_jax checkpoints WORKDIR --accept STEP"


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


def directory(workdir: Path) -> Path:
    """Return where the checkpoints of a work directory lie."""
    return (workdir / "checkpoints").absolute()


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


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of all files, which are on the disk then: a power cut after it loses none of them."""
    watched = {name: path for name, path in _files(folder).items() if name not in (CHECKSUMS, METADATA)}
    checksums = {name: _sha256(path, sync=True) for name, path in watched.items()}
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


class _Sealed(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint while it is written; it gets its checksums right before it is renamed and so becomes valid."""

    async def finalize(self) -> None:
        final = Path(self.get_final())
        whole = final.name.isdigit()  # not a part of a checkpoint
        if whole:
            await asyncio.to_thread(write_checksums, Path(self.get()))
        await super().finalize()
        if whole:
            (final.parents[1] / LAST).write_text(f"{final.name}\n")


def _is_news(record: logging.LogRecord) -> bool:
    """Leave out that a checkpoint has no validation error: not every run has validation images."""
    return "tracked_metric" not in record.getMessage()


class Checkpoints:
    """Writes the checkpoints of one work directory, in WORKDIR/checkpoints/STEP; one process writes at a time.

    Every method raises StorageError if one cannot be written; complete ones stay.
    """

    def __init__(self, workdir: Path, *, keep: int = 1):
        """Open them; `keep` is how many of the last ones stay, beside the best on the validation split.

        Damaged ones should have been set aside.
        """

        def error(noted: dict[str, float]) -> float:
            return noted[VALIDATION_ERROR]

        best = BestN(get_metric_fn=error, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
            best_fn=error,
            best_mode="min",
            cleanup_tmp_directories=True,  # what a killed run was writing
            temporary_path_class=_Sealed,
        )
        logging.getLogger("absl").addFilter(_is_news)
        self.workdir, self.directory = workdir, directory(workdir)
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._last = self.latest()

    def steps(self) -> list[int]:
        """Return the steps with a complete checkpoint, ascending."""
        return saved_steps(self.workdir)

    def latest(self) -> int | None:
        """Return the last step with a complete checkpoint."""
        return max(self.steps(), default=None)

    def save(
        self, state: Any, *, validation_error: float | None = None, evaluated: bool = True, wait: bool = False
    ) -> None:
        """Save under state.step, unless that is saved.

        Returns once the state is copied to the host, so that its buffers may be donated; the files are
        written in the background unless `wait`, or the state has stacked blocks.

        Args:
          state: on the devices.
          validation_error: in %.
          evaluated: whether the evaluation after this step, if one is due, was made.
          wait: for the files.
        """
        step = int(state.step)
        self.wait()
        if step != self._last:
            if is_stacked(state):
                # On the host taking apart copies nothing; but the views must not outlive the buffers.
                state, wait = unstack_blocks(jax.device_get(state)), True
            with self._storing():
                self._manager.save(
                    step,
                    args=ocp.args.StandardSave(state),
                    metrics=None if validation_error is None else {VALIDATION_ERROR: validation_error},
                    custom_metadata={EVALUATED: evaluated},
                    force=True,
                )
            self._last = step
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait for what is being written."""
        with self._storing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish what is being written."""
        with self._storing():
            self._manager.close()

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax passes on whatever its threads and tensorstore raise
            last = self.latest()
            kept = "there is no complete one yet" if last is None else f"the last complete one is of step {last}"
            raise StorageError(
                f"cannot save a checkpoint in {self.directory}: {_reason(error)}; {kept}; run it again when"
                " that is mended"
            ) from error


def _reason(error: Exception) -> str:
    """Return the operating system's reason, which stands in the middle of tensorstore's message."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else reason(error)


def verify(workdir: Path, step: int) -> Damage | None:
    """Compare the files of a checkpoint with their checksums, reading all of them; None if it is intact."""
    folder = directory(workdir) / str(step)
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
        write_checksums(directory(workdir) / str(step))
    except OSError as error:
        raise StorageError(f"cannot write checksums of step {step} in {workdir}: {reason(error)}") from error


def _check_saved(workdir: Path, step: int) -> None:
    if step not in saved_steps(workdir):
        saved = ", ".join(map(str, saved_steps(workdir))) or "none"
        raise UserError(f"{directory(workdir)} has no checkpoint of step {step}; there are: {saved}")


def was_evaluated(workdir: Path, step: int) -> bool:
    """Tell whether the evaluation due after a saved step was made: not if a signal stopped the run there."""
    metadata = _read_metadata(directory(workdir) / str(step))
    return metadata is None or metadata["custom_metadata"].get(EVALUATED, True)


def mark_evaluated(workdir: Path, step: int) -> None:
    """Note that the evaluation which was_evaluated() missed has been made."""
    path = directory(workdir) / str(step)
    metadata = _read_metadata(path)
    if metadata is not None:
        metadata["custom_metadata"][EVALUATED] = True
        with atomic_write(path / METADATA) as partial:
            partial.write_text(json.dumps(metadata))


def _read_metadata(path: Path) -> dict[str, Any] | None:
    """Return what orbax notes of a checkpoint, or None if that is damaged."""
    try:
        metadata = read_json(path / METADATA)
        return metadata if isinstance(metadata["custom_metadata"], dict) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def best_step(workdir: Path) -> int | None:
    """Return the last saved step of the lowest validation error, or None without a validation split."""
    errors = {step: _validation_error(directory(workdir) / str(step)) for step in saved_steps(workdir)}
    known = {step: error for step, error in errors.items() if error is not None}
    return min(known, key=lambda step: (known[step], -step), default=None)


def _validation_error(path: Path) -> float | None:
    """Return the validation error in %, if it was noted and can be read."""
    try:
        return float(read_json(path / "metrics" / "metrics")[VALIDATION_ERROR])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def recover(workdir: Path) -> list[str]:
    """Move damaged checkpoints to WORKDIR/damaged, so that the newest intact one is the last.

    Returns:
      What a user should know of it, a line each.

    Raises:
      UserError: none is intact, or those that were saved are gone; nothing was moved.
      StorageError: they cannot be moved.
    """
    found = {step: verify(workdir, step) for step in saved_steps(workdir)}
    intact = [step for step, damage in found.items() if damage is None]
    damaged = {step: damage for step, damage in found.items() if damage is not None}
    if damaged and not intact:
        raise UserError(_none_intact(workdir, damaged))
    noted = _last_saved(workdir)
    if noted is not None and not intact:
        raise UserError(
            f"{directory(workdir)} is empty, but a checkpoint of step {noted} was saved there: copy it back from"
            f" elsewhere, or delete {workdir} to begin again"
        )
    done = []
    if noted is not None and noted > max(found):
        done.append(f"the checkpoint of step {noted} is gone from {directory(workdir)}")
    try:
        for step, damage in damaged.items():
            path, aside = directory(workdir) / str(step), workdir / "damaged" / str(step)
            if step < intact[-1] and not damage.changed and CHECKSUMS not in damage.missing:
                shutil.rmtree(path)  # a run was killed while it was removing this one
                continue
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            path.rename(aside)
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


def restore(workdir: Path, abstract_state: Any, step: int | None = None) -> Any:
    """Read the state saved at `step` in the shapes, dtypes and shardings of `abstract_state`.

    Args:
      workdir: of the run.
      abstract_state: ShapeDtypeStructs with shardings.
      step: None for the newest intact checkpoint; a warning names the newer ones.

    Raises:
      UserError: no intact checkpoint of that step, or one of another network.
    """
    return read_state(workdir, intact_step(workdir, step), abstract_state)


def restore_variables(workdir: Path, abstract_variables: Any, step: int | None = None) -> tuple[int, Any]:
    """Read `params` and `batch_stats` alone, whatever the optimizer is or was; see restore(). Return also the step."""
    step = intact_step(workdir, step)
    return step, read_state(workdir, step, abstract_variables, partial=True)


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


def read_state(workdir: Path, step: int, abstract_state: Any, *, partial: bool = False) -> Any:
    """Read a checkpoint that was verified before, or a part of it; see restore().

    Raises:
      UserError: it is of another network.
    """
    path = directory(workdir) / str(step)
    stacked = is_stacked(abstract_state)
    wanted = abstract_state
    if stacked:  # on the host
        wanted = jax.tree.map(
            lambda leaf: np.empty(leaf.shape, leaf.dtype), jax.eval_shape(unstack_blocks, abstract_state)
        )
    how = ocp.checkpoint_utils.construct_restore_args(wanted)
    args = ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=partial)
    try:
        with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as checkpointer:
            state = checkpointer.restore(path / "default", args=args)
        jax.tree.map(_check_shape, wanted, state)  # orbax cuts and fills up arrays on the host without a word
    except (ValueError, KeyError, TypeError) as error:  # its files are as they were written
        raise UserError(f"{path} does not fit the network of config.json there: {reason(error)}") from error
    if stacked:
        state = stack_blocks(state)
        state = jax.tree.map(lambda leaf, abstract: jax.device_put(leaf, abstract.sharding), state, abstract_state)
    return state


def _check_shape(wanted: Any, found: Any) -> None:
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        raise ValueError(f"{found.dtype} {found.shape} in place of {wanted.dtype} {wanted.shape}")


def describe(workdir: Path) -> tuple[str, bool]:
    """Return a table of all checkpoints, verified, and whether one is damaged."""
    found = {step: verify(workdir, step) for step in saved_steps(workdir)}
    found = {step: damage for step, damage in found.items() if (directory(workdir) / str(step)).is_dir()}  # still
    damaged = {step: damage for step, damage in found.items() if damage is not None}
    last, best = max(found.keys() - damaged.keys(), default=None), best_step(workdir)
    lines = [f"{'step':>9}  {'saved':19}  {'MB':>8}  {'validation':>10}  state"]
    for step in found:
        path = directory(workdir) / str(step)
        written = path / METADATA  # the last of its files
        at = datetime.datetime.fromtimestamp((written if written.exists() else path).stat().st_mtime)
        size = sum(file.stat().st_size for file in _files(path).values()) / 1e6
        error = _validation_error(path)
        validation = "" if error is None else f"{error:.2f} %"
        state = f"damaged: {damaged[step]}" if step in damaged else "intact"
        state += ", the last" * (step == last) + ", the best" * (step == best)
        lines.append(f"{step:9}  {at:%F %T}  {size:8.1f}  {validation:>10}  {state}")
    if not found:
        lines = [f"{directory(workdir)} holds no checkpoint"]
    if _without_checksums(damaged):
        lines.append(f"one without checksums.json may be of a version that wrote none: {_ACCEPT} writes them")
    lines += [f"{name}: being saved, or left by a run that ended then" for name in unfinished(workdir)]
    return "\n".join(lines), bool(damaged)
