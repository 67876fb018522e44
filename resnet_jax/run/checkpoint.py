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
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from resnet_jax.errors import StorageError, UserError, reason
from resnet_jax.files import atomic_write, read_json
from resnet_jax.models.stacking import is_stacked, stack_blocks, unstack_blocks

CHECKSUMS = "checksums.json"  # of a folder's files, in the folder
VALIDATION_ERROR, EVALUATED = "validation_error", "evaluated"  # what is noted of a checkpoint
LAST = "last_checkpoint"  # a file beside the folder: what was saved is missed if the folder is lost
METADATA = "_CHECKPOINT_METADATA"  # orbax writes the time of the commit into it, after our checksums


class _Sealed(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint while it is written; it gets its checksums right before it is renamed and so becomes valid."""

    async def finalize(self) -> None:
        final = Path(self.get_final())
        whole = final.name.isdigit()  # not a part of a checkpoint
        if whole:
            await asyncio.to_thread(write_checksums, Path(self.get()), leave_out=[METADATA])
        await super().finalize()
        if whole:
            (final.parents[1] / LAST).write_text(f"{final.name}\n")


class Checkpoints:
    """Writes the checkpoints of one work directory, in WORKDIR/checkpoints/STEP; one process writes at a time."""

    def __init__(self, workdir: Path, *, keep: int = 1):
        """Open them; `keep` is how many of the last ones stay, beside the best on the validation split.

        Damaged ones should have been set aside.
        """
        best = BestN(
            get_metric_fn=lambda metrics: metrics[VALIDATION_ERROR],
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
            best_fn=lambda metrics: metrics[VALIDATION_ERROR],
            best_mode="min",
            cleanup_tmp_directories=True,  # what a killed run was writing
            temporary_path_class=_Sealed,
        )
        self.workdir, self.directory = workdir, directory(workdir)
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._last = self._manager.latest_step()

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

        Raises:
          StorageError: this or the checkpoint before cannot be written; complete ones stay.
        """
        step = int(state.step)
        self.wait()
        if step != self._last:
            if is_stacked(state):
                # On the host taking apart copies nothing; but the views must not outlive the buffers.
                state, wait = unstack_blocks(jax.device_get(state)), True
            metrics = None if validation_error is None else {VALIDATION_ERROR: validation_error}
            with self._storing():
                self._manager.save(
                    step,
                    args=ocp.args.StandardSave(state),
                    metrics=metrics,
                    custom_metadata={EVALUATED: evaluated},
                    force=True,
                )
            self._last = step
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait for what is being written.

        Raises:
          StorageError: it cannot be written; complete checkpoints stay.
        """
        with self._storing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish what is being written.

        Raises:
          StorageError: it cannot be written; complete checkpoints stay.
        """
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
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    if number := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(number[1]))
    return (text.splitlines() or [type(error).__name__])[0]


class Checkpoint(NamedTuple):
    """What lies in WORKDIR/checkpoints/STEP.

    Attributes:
      step: training steps made.
      path: the folder.
      damage: None if it is intact.
    """

    step: int
    path: Path
    damage: Damage | None

    def saved_at(self) -> datetime.datetime:
        """Return when it was written, in local time."""
        written = self.path / METADATA  # the last of its files
        return datetime.datetime.fromtimestamp((written if written.exists() else self.path).stat().st_mtime)

    def size(self) -> int:
        """Return the bytes of its files."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    def validation_error(self) -> float | None:
        """Return the validation error in %, if there is a validation split and it is intact."""
        try:
            return float(read_json(self.path / "metrics" / "metrics")[VALIDATION_ERROR])
        except (OSError, ValueError, TypeError, KeyError):
            return None


def directory(workdir: Path) -> Path:
    """Return where the checkpoints of a work directory lie."""
    return (workdir / "checkpoints").absolute()


def saved_steps(workdir: Path) -> list[int]:
    """Return the steps with a checkpoint, ascending, damaged ones among them."""
    with contextlib.suppress(FileNotFoundError):
        names = (path.name for path in directory(workdir).iterdir())
        return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))
    return []


def verify(workdir: Path, step: int) -> Checkpoint:
    """Compare the files of a checkpoint with their checksums; all of them are read."""
    path = directory(workdir) / str(step)
    damage = find_damage(path)
    if damage is None and _read_metadata(path) is None:
        damage = Damage((), (METADATA,)) if (path / METADATA).exists() else Damage((METADATA,), ())
    return Checkpoint(step, path, damage)


def accept(workdir: Path, step: int) -> None:
    """Give a checkpoint the checksums of its files as they are now.

    Raises:
      UserError: there is no such checkpoint.
      StorageError: they cannot be written.
    """
    _check_saved(workdir, step)
    try:
        write_checksums(directory(workdir) / str(step), leave_out=[METADATA])
    except OSError as error:
        raise StorageError(f"cannot write checksums of step {step} in {workdir}: {error.strerror}") from error


def _check_saved(workdir: Path, step: int) -> None:
    if step not in saved_steps(workdir):
        saved = ", ".join(map(str, saved_steps(workdir))) or "none"
        raise UserError(f"{directory(workdir)} has no checkpoint of step {step}; there are: {saved}")


def unfinished(workdir: Path) -> list[str]:
    """Return the names of what was being saved when a run ended, or is being saved now."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(path.name for path in directory(workdir).iterdir() if "orbax-checkpoint-tmp" in path.name)
    return []


def best_step(workdir: Path) -> int | None:
    """Return the last saved step of the lowest validation error, or None without a validation split."""
    checkpoints = [Checkpoint(step, directory(workdir) / str(step), None) for step in saved_steps(workdir)]
    errors = {checkpoint.step: checkpoint.validation_error() for checkpoint in checkpoints}
    known = {step: error for step, error in errors.items() if error is not None}
    return min(known, key=lambda step: (known[step], -step), default=None)


def was_evaluated(workdir: Path, step: int) -> bool:
    """Tell whether the evaluation due after a saved step was made: not if a signal stopped the run there."""
    metadata = _read_metadata(directory(workdir) / str(step))
    return metadata is None or metadata["custom_metadata"].get(EVALUATED, True)


def mark_evaluated(workdir: Path, step: int) -> None:
    """Note that the evaluation which was_evaluated() missed has been made.

    Raises:
      UserError: it cannot be written.
    """
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


def recover(workdir: Path) -> list[str]:
    """Move damaged checkpoints to WORKDIR/damaged, so that the newest intact one is the last.

    Returns:
      What a user should know of it, a line each.

    Raises:
      UserError: none is intact, or those that were saved are gone; nothing was moved.
      StorageError: they cannot be moved.
    """
    checkpoints = [verify(workdir, step) for step in saved_steps(workdir)]
    intact = [checkpoint.step for checkpoint in checkpoints if checkpoint.damage is None]
    damaged = [checkpoint for checkpoint in checkpoints if checkpoint.damage is not None]
    if damaged and not intact:
        raise UserError(_none_intact(workdir, damaged))
    noted = _last_saved(workdir)
    if noted is not None and not intact:
        raise UserError(
            f"{directory(workdir)} is empty, but a checkpoint of step {noted} was saved there: copy it back from"
            f" elsewhere, or delete {workdir} to begin again"
        )
    done = []
    if noted is not None and noted > checkpoints[-1].step:
        done.append(f"the checkpoint of step {noted} is gone from {directory(workdir)}")
    try:
        for step, path, damage in damaged:
            if step < intact[-1] and damage and not damage.changed and CHECKSUMS not in damage.missing:
                shutil.rmtree(path)  # a run was killed while it was removing this one
                continue
            aside = workdir / "damaged" / path.name
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            path.rename(aside)
            done.append(f"the checkpoint of step {step} is damaged ({damage}): moved to {aside}")
    except OSError as error:
        raise StorageError(f"cannot move a damaged checkpoint out of {directory(workdir)}: {error.strerror}") from error
    return done


def _last_saved(workdir: Path) -> int | None:
    """Return the last step that was ever saved; None if none was, or nothing says so."""
    try:
        return int((workdir / LAST).read_text())
    except (OSError, ValueError):
        return None


def _none_intact(workdir: Path, damaged: list[Checkpoint]) -> str:
    faults = "; ".join(f"step {checkpoint.step}: {checkpoint.damage}" for checkpoint in damaged)
    accept = f", or if only checksums are missing: {_ACCEPT}" if _without_checksums(damaged) else ""
    return f"no checkpoint in {directory(workdir)} is intact ({faults}): copy one back from elsewhere{accept}"


_ACCEPT = "python -m resnet_jax checkpoints WORKDIR --accept STEP"


def _without_checksums(checkpoints: list[Checkpoint]) -> bool:
    return any(checkpoint.damage and CHECKSUMS in checkpoint.damage.missing for checkpoint in checkpoints)


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
    """Read `params` and `batch_stats` alone, whatever the optimizer is or was; see restore(). Return also the step.

    Args:
      workdir: of the run.
      abstract_variables: a dict of both, of ShapeDtypeStructs with shardings.
      step: None for the newest intact checkpoint.

    Raises:
      UserError: no intact checkpoint of that step, or one of another network.
    """
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
    damaged: list[Checkpoint] = []
    for candidate in reversed(steps) if step is None else [step]:
        checkpoint = verify(workdir, candidate)
        if checkpoint.damage is None:
            for other in damaged:
                message = f"the checkpoint of step {other.step} is damaged ({other.damage}): using step {candidate}"
                print(f"warning: {message}", file=sys.stderr)
            return candidate
        damaged.append(checkpoint)
    if saved_steps(workdir) != steps:  # a run that goes on has removed what we were reading
        return intact_step(workdir, step)
    if step is None:
        raise UserError(_none_intact(workdir, damaged))
    raise UserError(f"the checkpoint of step {step} in {directory(workdir)} is damaged: {damaged[0].damage}")


def read_state(workdir: Path, step: int, abstract_state: Any, *, partial: bool = False) -> Any:
    """Read a checkpoint that was verified before, or a part of it; see restore().

    Raises:
      UserError: it is of another network.
    """
    path = directory(workdir) / str(step)
    stacked = is_stacked(abstract_state)
    wanted = abstract_state
    if stacked:
        by_block = jax.eval_shape(unstack_blocks, abstract_state)
        wanted = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), by_block)
    handler: Any = ocp.StandardCheckpointHandler()
    args: Any = ocp.args.StandardRestore(wanted)
    if partial:
        handler = ocp.PyTreeCheckpointHandler()
        how = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True)
    try:
        with contextlib.closing(ocp.Checkpointer(handler)) as checkpointer:
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
    checkpoints = [verify(workdir, step) for step in saved_steps(workdir)]
    checkpoints = [checkpoint for checkpoint in checkpoints if checkpoint.path.is_dir()]  # not removed meanwhile
    intact = [checkpoint.step for checkpoint in checkpoints if checkpoint.damage is None]
    best = best_step(workdir)
    lines = [f"{'step':>9}  {'saved':19}  {'MB':>8}  {'validation':>10}  state"]
    for checkpoint in checkpoints:
        error = checkpoint.validation_error()
        state = "intact" if checkpoint.damage is None else f"damaged: {checkpoint.damage}"
        state += ", the last" if checkpoint.step == max(intact, default=None) else ""
        state += ", the best" if checkpoint.step == best else ""
        validation = "" if error is None else f"{error:.2f} %"
        size = checkpoint.size() / 1e6
        lines.append(f"{checkpoint.step:9}  {checkpoint.saved_at():%F %T}  {size:8.1f}  {validation:>10}  {state}")
    if not checkpoints:
        lines = [f"{directory(workdir)} holds no checkpoint"]
    if _without_checksums(checkpoints):
        lines.append(f"one without checksums.json may be of a version that wrote none: {_ACCEPT} writes them")
    lines += [f"{name}: being saved, or left by a run that ended then" for name in unfinished(workdir)]
    return "\n".join(lines), len(intact) < len(checkpoints)


class Damage(NamedTuple):
    """What is wrong with a folder.

    Attributes:
      missing: files that are gone.
      changed: files with other contents.
    """

    missing: tuple[str, ...]
    changed: tuple[str, ...]

    def __str__(self) -> str:
        name, verb = (self.changed[0], "has changed") if self.changed else (self.missing[0], "is missing")
        others = len(self.changed) + len(self.missing) - 1
        return f"{name} {verb}" + (f", and {others} more files" if others else "")


def write_checksums(folder: Path, *, leave_out: Collection[str] = ()) -> None:
    """Write the SHA-256 of all files, which are on the disk then: a power cut after it loses none of them.

    Args:
      folder: it and what is below it.
      leave_out: names in `folder` itself of files that may still change.
    """
    checksums = {name: _sha256(path, sync=True) for name, path in _files(folder).items() if name not in leave_out}
    text = json.dumps(checksums, indent=0) + "\n"
    with (folder / CHECKSUMS).open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: Path) -> Damage | None:
    """Compare a folder with its checksums; None if all files that they name are as they were."""
    files = _files(folder)
    if CHECKSUMS not in files:
        return Damage((CHECKSUMS,), ())
    try:
        checksums = read_json(files[CHECKSUMS])
        if not isinstance(checksums, dict) or not checksums:
            return Damage((), (CHECKSUMS,))
        missing = [name for name in checksums if name not in files]
        # Only files that are in the folder are opened, whatever the names are.
        changed = [name for name, path in files.items() if name in checksums and _sha256(path) != checksums[name]]
    except (OSError, ValueError, TypeError):
        return Damage((), (CHECKSUMS,))
    return Damage(tuple(missing), tuple(changed)) if missing or changed else None


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
