"""Everything that a training step changes."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """The state after `step` steps.

    Attributes:
      step: int32 scalar.
      params: parameters of the model, float32.
      batch_stats: running statistics of BN, float32; empty for VGG.
      opt_state: state of the optimizer.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any


def create_train_state(optimizer: optax.GradientTransformation, variables: Any) -> TrainState:
    """Return the state before the first step, for the initial variables of a model."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(variables["params"]),
    )
