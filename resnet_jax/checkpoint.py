"""Checkpoints of the whole TrainState with orbax: written in the background, complete or not there at all.

They hold every block by its name, also those of a network with scan_blocks: one may be trained on as the other. Each
has the checksums of its files, written before the rename that makes it valid and compared before it is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from resnet_jax.checksums import write_checksums
from resnet_jax.errors import StorageError
from resnet_jax.models.stacking import is_stacked, unstack_blocks
from resnet_jax.restore import EVALUATED, LAST, METADATA, VALIDATION_ERROR, directory, saved_steps
from resnet_jax.train_state import TrainState


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
        self, state: TrainState, *, validation_error: float | None = None, evaluated: bool = True, wait: bool = False
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
