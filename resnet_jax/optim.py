"""The paper's SGD and its learning-rate schedules (Sec. 3.4, 4.2) as optax transformations.

A further schedule is one function and one entry of SCHEDULES.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from optax.contrib import ReduceLROnPlateauState

from resnet_jax.config import OptimConfig
from resnet_jax.errors import UserError, did_you_mean

HEADS = ("fc", "fc8", "scores", "deltas")  # the layers that depend on the number of classes
# Smooths the batch error, which at 128 images jumps by several %; 1/(1-0.98) = 50 steps.
_ERROR_DECAY = 0.98


def step_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Divide the rate by 10 at each boundary; without any it is constant.

    Steps count from 0, the first of the warm-up; step `boundaries[i]` is the first one at the lower rate, as in
    Caffe's "multistep".
    """
    del steps
    schedules, starts = _warm_up(config)
    starts = [*starts, *config.boundaries]
    if any(a >= b for a, b in itertools.pairwise([0, *starts])):
        raise ValueError(f"steps must increase from the warm-up to the last boundary; got {starts}")
    drops = range(len(config.boundaries) + 1)
    schedules += [optax.constant_schedule(config.learning_rate / 10**drop) for drop in drops]
    return optax.join_schedules(schedules, starts)


def plateau_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Keep the rate, which reduce_on_plateau() multiplies."""
    return step_schedule(dataclasses.replace(config, boundaries=()), steps)


def cosine_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Lower the rate after the warm-up along half a period of a cosine, so that it would be 0 at step `steps`."""
    schedules, starts = _warm_up(config)
    begin = starts[0] if starts else 0
    if begin >= steps:
        raise ValueError(f"the warm-up must be shorter than all {steps} steps; got {begin}")
    return optax.join_schedules([*schedules, optax.cosine_decay_schedule(config.learning_rate, steps - begin)], starts)


def _warm_up(config: OptimConfig) -> tuple[list[optax.Schedule], list[int]]:
    """Return the schedule of the first steps, and the step at which the next one takes over; nothing without."""
    if config.warmup == "steps":
        return [optax.constant_schedule(config.warmup_learning_rate)], [config.warmup_steps]
    if config.warmup == "linear":
        return [optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)], [config.warmup_steps]
    return [], []


# By the name in a configuration: (config, steps in all) -> schedule; ValueError for steps that do not fit.
SCHEDULES: dict[str, Callable[[OptimConfig, int], optax.Schedule]] = {
    "steps": step_schedule,
    "plateau": plateau_schedule,
    "cosine": cosine_schedule,
}


def build_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Build the schedule for so many training steps.

    Raises:
      UserError: an unknown schedule, boundaries that do not increase, or a warm-up that leaves no step.
    """
    if config.schedule not in SCHEDULES:
        hint = did_you_mean(config.schedule, SCHEDULES)
        raise UserError(f"--optim.schedule {config.schedule}: choose {', '.join(SCHEDULES)}{hint}")
    try:
        return SCHEDULES[config.schedule](config, steps)
    except ValueError as error:
        option = "--optim.boundaries" if config.schedule == "steps" else "--optim.warmup-steps"
        raise UserError(f"{option}: {error}") from error


def build_optimizer(
    config: OptimConfig, schedule: optax.Schedule, trainable: Callable[[Any], Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Build SGD by a schedule, with the warm-up and the plateaus that depend on errors.

    Args:
      config: of the optimizer.
      schedule: of build_schedule().
      trainable: trainable(params) is a tree of bools; what is False stays as it is. None: all are trained.
    """
    factors = []
    if config.warmup == "error":
        factors.append(warm_up_until_error(config.warmup_error, config.warmup_learning_rate / config.learning_rate))
    if config.schedule == "plateau":
        factors.append(reduce_on_plateau(config.plateau_patience))
    optimizer = sgd(
        schedule,
        momentum=config.momentum,
        momentum_style=config.momentum_style,
        weight_decay=config.weight_decay,
        weight_decay_on=config.weight_decay_on,
        factors=factors,
    )
    if _has_factors(config):
        optimizer = optax.with_extra_args_support(optax.chain(optimizer, scale_parts(config)))
    return optimizer if trainable is None else freeze(optimizer, trainable)


def treats_all_alike(config: OptimConfig) -> bool:
    """Tell whether an optimizer does the same with every kernel, and with every other parameter."""
    return config.trainable == ("all",) and not _has_factors(config)


def _has_factors(config: OptimConfig) -> bool:
    return (config.head_factor, config.bias_factor) != (1.0, 1.0)


def scale_parts(config: OptimConfig) -> optax.GradientTransformation:
    """Multiply the updates of the last layer and of biases: that is a rate of their own, for gradient and decay."""

    def factor(path: Any) -> float:
        of_head = config.head_factor if path[0].key in HEADS else 1.0
        return of_head * (config.bias_factor if path[-1].key == "bias" else 1.0)

    def update(updates: Any, params: Any = None) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf * factor(path), updates)

    return optax.stateless(update)


def freeze(
    optimizer: optax.GradientTransformationExtraArgs, trainable: Callable[[Any], Any]
) -> optax.GradientTransformationExtraArgs:
    """Keep an optimizer from changing some parameters: they get neither gradient nor decay nor momentum.

    The state is the optimizer's own, so that checkpoints do not depend on what is frozen.

    Args:
      optimizer: for all parameters.
      trainable: trainable(params) is a tree of bools; what is False stays as it is.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        mask = trainable(params)

        def masked(tree: Any) -> Any:
            return jax.tree.map(lambda keep, leaf: leaf if keep else jnp.zeros_like(leaf), mask, tree)

        updates, state = optimizer.update(masked(updates), state, masked(params), **extra)
        return masked(updates), state  # a velocity from before it was frozen runs out without an effect

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


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


def reduce_on_plateau(patience: int) -> optax.GradientTransformationExtraArgs:
    """Scale the updates by 1, and by a tenth of that after each plateau of the validation error.

    Sec. 3.4: the rate "is divided by 10 when the error plateaus". A training step only multiplies; errors are taken
    in by note_validation_error().

    Args:
      patience: errors in a row, none lower than the lowest before, that are a plateau.
    """
    plateau = _plateau(patience)

    def update(updates: Any, state: ReduceLROnPlateauState, params: Any = None, **extra: Any) -> Any:
        del params, extra
        return jax.tree.map(lambda update: update * state.scale, updates), state

    return optax.GradientTransformationExtraArgs(plateau.init, update)


def note_validation_error(opt_state: Any, error: float, *, patience: int) -> Any:
    """Return the state of an optimizer with reduce_on_plateau() after one more evaluation; other states as they are.

    Every process must call it with the same error. The arrays stay on the devices they are on.

    Args:
      opt_state: of the optimizer.
      error: on the validation split, in %.
      patience: see reduce_on_plateau().
    """
    plateau = _plateau(patience)

    def note(state: Any) -> Any:
        if not _is_plateau(state):
            return state
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        take_in = jax.jit(lambda state, value: plateau.update({}, state, value=value)[1], out_shardings=shardings)
        return take_in(state, error)

    return jax.tree.map(note, opt_state, is_leaf=_is_plateau)


def _plateau(patience: int) -> optax.GradientTransformationExtraArgs:
    # optax wants a tolerance: this one is below the share of a single image among any validation images.
    return optax.contrib.reduce_on_plateau(factor=0.1, patience=patience, rtol=0.0, atol=1e-6)


def _is_plateau(state: Any) -> bool:
    return isinstance(state, ReduceLROnPlateauState)


def current_learning_rate(schedule: optax.Schedule, step: jax.Array, opt_state: Any) -> jax.Array:
    """Return the rate of the update of `step`, given the state of the optimizer after it."""
    rate = schedule(step) * optax.tree.get(opt_state, "warm_up_factor", 1.0)
    for state in filter(_is_plateau, jax.tree.leaves(opt_state, is_leaf=_is_plateau)):
        rate = rate * state.scale
    return rate


def sgd(
    schedule: optax.Schedule,
    *,
    momentum: float = 0.9,
    momentum_style: Literal["caffe", "torch"] = "caffe",
    weight_decay: float = 1e-4,
    weight_decay_on: Literal["all", "kernels"] = "all",
    factors: Sequence[optax.GradientTransformationExtraArgs] = (),
) -> optax.GradientTransformationExtraArgs:
    """Build SGD with momentum and coupled weight decay.

    Args:
      schedule: learning rate by step.
      momentum: share of the old velocity.
      momentum_style: "caffe", as the authors: v = momentum v + rate g, update -v; "torch": v = momentum v + g,
        update -rate v. They differ for some steps after each change of the rate.
      weight_decay: times the parameter is added to the gradient (L2 penalty; not decoupled).
      weight_decay_on: "all" parameters, as Caffe does, or "kernels": not the biases and the BN parameters.
      factors: further factors of the rate: warm_up_until_error(), reduce_on_plateau().
    """

    def kernels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    decay = optax.add_decayed_weights(weight_decay, mask=kernels if weight_decay_on == "kernels" else None)
    rate = [optax.scale_by_learning_rate(schedule), *factors]
    trace = [optax.trace(momentum)]
    ordered = [*rate, *trace] if momentum_style == "caffe" else [*trace, *rate]
    return optax.with_extra_args_support(optax.chain(decay, *ordered))
