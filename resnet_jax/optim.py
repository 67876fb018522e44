"""The paper's SGD and its learning-rate schedules (Sec. 3.4, 4.2) as optax transformations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

WeightDecayOn = Literal["all", "kernels"]
Momentum = Literal["caffe", "torch"]

# Smooths the batch error, which at 128 images jumps by several %; 1/(1-0.98) = 50 steps.
_ERROR_DECAY = 0.98


def step_schedule(
    learning_rate: float, boundaries: Sequence[int], *, warmup_learning_rate: float = 0.0, warmup_steps: int = 0
) -> optax.Schedule:
    """Divide the rate by 10 at each boundary; with warmup_steps > 0 begin with so many steps at another rate.

    Steps count from 0; step `boundaries[i]` is the first one at the lower rate, as in Caffe's "multistep".

    Raises:
      ValueError: the boundaries do not increase or begin inside the warm-up.
    """
    starts = [0, *([warmup_steps] if warmup_steps else []), *boundaries]
    if any(a >= b for a, b in itertools.pairwise(starts)):
        raise ValueError(f"steps must increase from the warm-up to the last boundary; got {starts[1:]}")
    rates = [learning_rate / 10**drops for drops in range(len(boundaries) + 1)]
    if warmup_steps:
        rates = [warmup_learning_rate, *rates]
    return optax.join_schedules([optax.constant_schedule(rate) for rate in rates], starts[1:])


class WarmUpState(NamedTuple):
    """State of warm_up_until_error; `warm_up_factor` multiplies the rate of the step just taken.

    Attributes:
      mean_error: decayed sum of the batch errors, in %; divide by weight.
      weight: decayed count of the steps in it.
      warm: whether the error was below the threshold before.
      warm_up_factor: factor, or 1 once warm.
    """

    mean_error: jax.Array
    weight: jax.Array
    warm: jax.Array
    warm_up_factor: jax.Array


def warm_up_until_error(threshold: float, factor: float) -> optax.GradientTransformationExtraArgs:
    """Scale the updates by `factor` until the measured training error falls below `threshold` %.

    Sec. 4.2: "we use 0.01 to warm up the training until the training error is below 80% (about 400
    iterations), and then go back to 0.1". The error is the average over the recent batches; once below, the
    rate never goes back. The update function takes the error of the batch in % as the extra argument `error`.
    """

    def init(params: Any) -> WarmUpState:
        del params
        return WarmUpState(jnp.zeros(()), jnp.zeros(()), jnp.zeros((), bool), jnp.full((), factor, jnp.float32))

    def update(updates: Any, state: WarmUpState, params: Any = None, *, error: jax.Array, **extra: Any) -> Any:
        del params, extra
        # This batch was drawn before the update, so its error may already end the warm-up.
        mean_error = _ERROR_DECAY * state.mean_error + (1 - _ERROR_DECAY) * error
        weight = _ERROR_DECAY * state.weight + (1 - _ERROR_DECAY)
        # A first lucky batch must not end it: wait until half the weight of the average has come in.
        warm = state.warm | ((weight > 0.5) & (mean_error < threshold * weight))
        scale = jnp.where(warm, 1.0, factor)
        updates = jax.tree.map(lambda update: update * scale, updates)
        return updates, WarmUpState(mean_error, weight, warm, scale)

    return optax.GradientTransformationExtraArgs(init, update)


def current_learning_rate(schedule: optax.Schedule, step: jax.Array, opt_state: Any) -> jax.Array:
    """Return the rate of the update of `step`, given the state of the optimizer after it."""
    return schedule(step) * optax.tree.get(opt_state, "warm_up_factor", 1.0)


def sgd(
    schedule: optax.Schedule,
    *,
    momentum: float = 0.9,
    momentum_style: Momentum = "caffe",
    weight_decay: float = 1e-4,
    weight_decay_on: WeightDecayOn = "all",
    warm_up: optax.GradientTransformationExtraArgs | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Build SGD with momentum and coupled weight decay.

    Args:
      schedule: learning rate by step.
      momentum: share of the old velocity.
      momentum_style: "caffe", as the authors: v = momentum v + rate g, update -v; "torch": v = momentum v + g,
        update -rate v. They differ for some steps after each change of the rate.
      weight_decay: times the parameter is added to the gradient (L2 penalty; not decoupled).
      weight_decay_on: "all" parameters, as Caffe does, or "kernels": not the biases and the BN parameters.
      warm_up: a further factor of the rate.
    """

    def kernels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    decay = optax.add_decayed_weights(weight_decay, mask=kernels if weight_decay_on == "kernels" else None)
    rate = [optax.scale_by_learning_rate(schedule), *([warm_up] if warm_up else [])]
    trace = [optax.trace(momentum)]
    ordered = [*rate, *trace] if momentum_style == "caffe" else [*trace, *rate]
    return optax.with_extra_args_support(optax.chain(decay, *ordered))
