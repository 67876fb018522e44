"""Everything that a training step changes."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from resnet_jax.models import Model


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


def create_train_state(
    model: Model, optimizer: optax.GradientTransformation, key: jax.Array, image_shape: tuple[int, int, int]
) -> TrainState:
    """Initialize model and optimizer; image_shape is (H, W, C). Pure: jit it or take jax.eval_shape of it."""
    variables = model.init(key, jnp.zeros((1, *image_shape)), train=False)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(variables["params"]),
    )
