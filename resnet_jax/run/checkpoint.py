"""Checkpoints of the whole training state with orbax: written in the background, complete or not there at all.

They hold every block by its name, also those of a network with scan_blocks: one may be trained on as the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from resnet_jax.errors import StorageError, UserError, reason
from resnet_jax.models.stacking import is_stacked, stack_blocks, unstack_blocks
from resnet_jax.run.saved import (
    EVALUATED,
    LAST,
    VALIDATION_ERROR,
    directory,
    folder_of,
    intact_step,
    saved_steps,
    write_checksums,
)


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
        """Open them, recover()ed; `keep` of the last ones stay, beside the best on the validation split."""

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
        self.workdir = workdir
        self._manager = ocp.CheckpointManager(directory(workdir), options=options)
        self._last = self.latest()

    def latest(self) -> int | None:
        """Return the last step with a complete checkpoint."""
        return max(saved_steps(self.workdir), default=None)

    def save(self, state: Any, *, validation_error: float | None = None, evaluated: bool = True) -> None:
        """Save under state.step, unless that is saved.

        Returns once the state is copied to the host, so that its buffers may be donated; the files are written in the
        background, unless the state has stacked blocks.

        Args:
          state: on the devices.
          validation_error: in %.
          evaluated: whether the evaluation after this step, if one is due, was made.
        """
        step, stacked = int(state.step), is_stacked(state)
        self.wait()
        if step == self._last:
            return
        with self._storing():
            self._manager.save(
                step,
                args=ocp.args.StandardSave(unstack_blocks(jax.device_get(state)) if stacked else state),
                metrics=None if validation_error is None else {VALIDATION_ERROR: validation_error},
                custom_metadata={EVALUATED: evaluated},
                force=True,
            )
        self._last = step
        if stacked:  # on the host taking apart copies nothing; but the views must not outlive the buffers
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
                f"cannot save a checkpoint in {directory(self.workdir)}: {_reason(error)}; {kept}; run it again when"
                " that is mended"
            ) from error


def _reason(error: Exception) -> str:
    """Return the operating system's reason, which stands in the middle of tensorstore's message."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else reason(error)


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


def read_state(workdir: Path, step: int, abstract_state: Any, *, partial: bool = False) -> Any:
    """Read a checkpoint that was verified before, or only the parts of it that are asked for; see restore().

    Raises:
      UserError: it is of another network.
    """
    path = folder_of(workdir, step)
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
