"""Checkpoints of the whole TrainState with orbax: written in the background, complete or not there at all.

They hold every block by its name, also those of a network with scan_blocks: one may be trained on as the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from resnet_jax.errors import UserError
from resnet_jax.models.stacking import is_stacked, stack_blocks, unstack_blocks
from resnet_jax.train_state import TrainState

_ERROR = "validation_error"


class Checkpoints:
    """The checkpoints of one work directory, in WORKDIR/checkpoints/STEP; one process writes at a time."""

    def __init__(self, workdir: Path, *, keep: int = 1, read_only: bool = False):
        """Open them; `keep` is how many of the last ones stay, beside the best on the validation split."""
        best = BestN(
            get_metric_fn=lambda metrics: metrics[_ERROR], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else AnyPreservationPolicy([LatestN(keep), best]),
            best_fn=lambda metrics: metrics[_ERROR],
            best_mode="min",
            read_only=read_only,
            create=not read_only,
            cleanup_tmp_directories=not read_only,  # what a killed run was writing
        )
        self.directory = (workdir / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Return the steps with a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Return the last step with a checkpoint."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Return the step with the lowest validation error, or None without a validation split."""
        return self._manager.best_step()

    def save(self, state: TrainState, *, validation_error: float | None = None, wait: bool = False) -> None:
        """Save under state.step, unless that is saved; `validation_error` is in %.

        Returns once the state is copied to the host, so that its buffers may be donated; the files are
        written in the background unless `wait`, or the state has stacked blocks.
        """
        step = int(state.step)
        if step != self.latest():
            if is_stacked(state):
                # On the host taking apart copies nothing; but the views must not outlive the buffers.
                state, wait = unstack_blocks(jax.device_get(state)), True
            metrics = None if validation_error is None else {_ERROR: validation_error}
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics, force=True)
        if wait:
            self._manager.wait_until_finished()

    def restore(self, abstract_state: Any, step: int | None = None) -> TrainState:
        """Read the state saved at `step` (None: the last) in the shapes, dtypes and shardings of `abstract_state`.

        Raises:
          UserError: no checkpoint of that step.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.directory} holds no checkpoint yet")
        step = steps[-1] if step is None else step
        if step not in steps:
            saved = ", ".join(map(str, steps))
            raise UserError(f"{self.directory} has no checkpoint of step {step}; there are: {saved}")
        if not is_stacked(abstract_state):
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract_state))
        by_block = jax.eval_shape(unstack_blocks, abstract_state)
        on_host = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), by_block)
        state = stack_blocks(self._manager.restore(step, args=ocp.args.StandardRestore(on_host)))
        return jax.tree.map(lambda leaf, abstract: jax.device_put(leaf, abstract.sharding), state, abstract_state)

    def close(self) -> None:
        """Finish what is being written."""
        self._manager.close()
