"""Schedules and SGD, step by step against plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.config import OptimConfig
from resnet_jax.errors import UserError
from resnet_jax.optim import (
    build_optimizer,
    build_schedule,
    current_learning_rate,
    note_validation_error,
    reduce_on_plateau,
    sgd,
    warm_up_until_error,
)
from resnet_jax.run.checkpoint import Checkpoints, restore
from resnet_jax.steps import create_train_state


def step_schedule(learning_rate, boundaries, **warm_up):
    return build_schedule(OptimConfig(learning_rate=learning_rate, boundaries=boundaries, **warm_up), steps=1)


def rates(schedule, steps):
    return {step: float(schedule(step)) for step in steps}


def test_the_rate_of_the_paper_at_every_boundary():
    rate = step_schedule(0.1, (32_000, 48_000))
    expected = {0: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001, 63_999: 0.001}
    assert rates(rate, expected) == pytest.approx(expected, rel=1e-7)


def test_the_fixed_warm_up_of_resnet110_returns_to_the_full_rate():
    rate = step_schedule(0.1, (32_000, 48_000), warmup="steps", warmup_steps=400)
    expected = {0: 0.01, 399: 0.01, 400: 0.1, 31_999: 0.1, 32_000: 0.01, 48_000: 0.001}
    assert rates(rate, expected) == pytest.approx(expected, rel=1e-7)


def test_the_linear_warm_up_rises_from_0_and_boundaries_count_from_its_beginning():
    rate = build_schedule(OptimConfig(warmup="linear", warmup_steps=100, boundaries=(150, 200)), steps=300)
    expected = {0: 0, 1: 0.001, 50: 0.05, 99: 0.099, 100: 0.1, 149: 0.1, 150: 0.01, 200: 0.001, 299: 0.001}
    assert rates(rate, expected) == pytest.approx(expected, rel=1e-5)


def test_the_cosine_falls_from_the_full_rate_to_what_would_be_0_after_the_last_step():
    rate = build_schedule(OptimConfig(schedule="cosine", learning_rate=0.2), steps=600)
    # cos(60 degrees) = 1/2; 1 - cos(x) = x^2 / 2 for a small x
    expected = {0: 0.2, 200: 0.15, 300: 0.1, 400: 0.05, 599: 0.1 * (np.pi / 600) ** 2 / 2, 600: 0}
    assert rates(rate, expected) == pytest.approx(expected, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("warmup", ["steps", "linear"])
def test_the_cosine_begins_after_the_warm_up_and_ends_with_the_run(warmup):
    config = OptimConfig(
        schedule="cosine", learning_rate=0.2, warmup=warmup, warmup_steps=60, warmup_learning_rate=0.01
    )
    rate = build_schedule(config, steps=660)
    first = {0: 0.01, 30: 0.01, 59: 0.01} if warmup == "steps" else {0: 0, 30: 0.1, 59: 0.2 * 59 / 60}
    expected = {**first, 60: 0.2, 260: 0.15, 360: 0.1, 460: 0.05, 660: 0}
    assert rates(rate, expected) == pytest.approx(expected, rel=1e-5, abs=1e-9)
    with pytest.raises(UserError, match="--optim.warmup-steps: the warm-up must be shorter than all 60 steps; got 60"):
        build_schedule(config, steps=60)


def test_the_cosine_without_a_warm_up_does_not_mind_its_steps():
    rate = build_schedule(OptimConfig(schedule="cosine", warmup_steps=400), steps=10)
    assert rates(rate, [0, 5]) == pytest.approx({0: 0.1, 5: 0.05})


def test_no_boundaries_is_a_constant_rate():
    assert float(step_schedule(0.1, ())(10**6)) == pytest.approx(0.1)


@pytest.mark.parametrize("boundaries", [(2, 2), (3, 2), (0,), (300, 500)])
def test_boundaries_must_increase(boundaries):
    with pytest.raises(UserError, match="--optim.boundaries: steps must increase"):
        step_schedule(0.1, boundaries, warmup="steps", warmup_steps=400)


@pytest.mark.parametrize("style", ["caffe", "torch"])
@pytest.mark.parametrize("decay_on", ["all", "kernels"])
def test_sgd_step_by_step(style, decay_on):
    schedule = step_schedule(0.1, (3, 5))
    optimizer = sgd(schedule, momentum=0.9, momentum_style=style, weight_decay=0.01, weight_decay_on=decay_on)
    params = {"conv": {"kernel": jnp.array([1.0, -2.0])}, "bn": {"scale": jnp.array([3.0])}}
    state = optimizer.init(params)
    expected = {"kernel": np.array([1.0, -2.0]), "scale": np.array([3.0])}
    velocity = {name: 0 * value for name, value in expected.items()}
    random = np.random.RandomState(0)
    for step in range(8):
        gradient = {name: random.normal(size=value.shape) for name, value in expected.items()}
        rate = 0.1 if step < 3 else 0.01 if step < 5 else 0.001
        for name in expected:
            g = gradient[name] + (0.01 * expected[name] if decay_on == "all" or name == "kernel" else 0)
            velocity[name] = 0.9 * velocity[name] + (rate * g if style == "caffe" else g)
            expected[name] = expected[name] - (velocity[name] if style == "caffe" else rate * velocity[name])
        grads = {"conv": {"kernel": gradient["kernel"]}, "bn": {"scale": gradient["scale"]}}
        updates, state = optimizer.update(jax.tree.map(jnp.float32, grads), state, params, error=jnp.float32(50))
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["conv"]["kernel"], expected["kernel"], rtol=1e-5)
        np.testing.assert_allclose(params["bn"]["scale"], expected["scale"], rtol=1e-5)


def test_the_measured_warm_up_ends_below_the_threshold_and_never_comes_back():
    # Constant 90 %, then 70 %: the average with decay 0.98 falls below 80 % when 0.98^k < 1/2, k = 35.
    errors = [90.0] * 200 + [70.0] * 100 + [90.0] * 200
    warm_up = warm_up_until_error(80.0, 0.1)
    params = jnp.ones(2)
    state = warm_up.init(params)
    update = jax.jit(lambda state, error: warm_up.update(params, state, error=error))
    factors = []
    for error in errors:
        scaled, state = update(state, error)
        factors.append(float(scaled[0]))
        assert float(state.warm_up_factor) == pytest.approx(factors[-1])
    mean = weight = 0.0
    below = None
    for step, error in enumerate(errors):
        mean, weight = 0.98 * mean + 0.02 * error, 0.98 * weight + 0.02
        if below is None and mean / weight < 80:
            below = step
    assert 230 < below < 240
    assert factors == pytest.approx([0.1] * below + [1.0] * (len(errors) - below))


def test_one_lucky_batch_does_not_end_the_warm_up():
    warm_up = warm_up_until_error(80.0, 0.1)
    state = warm_up.init(jnp.ones(2))
    for error in [40.0] + [90.0] * 60:
        _, state = warm_up.update(jnp.ones(2), state, error=jnp.float32(error))
        assert not bool(state.warm)


def test_the_reported_rate_is_the_one_that_was_applied():
    schedule = step_schedule(0.1, (60,))
    optimizer = sgd(schedule, momentum=0.0, weight_decay=0.0, factors=[warm_up_until_error(80.0, 0.1)])
    params = jnp.zeros(1)
    state = optimizer.init(params)
    applied = []
    for step in range(70):
        updates, state = optimizer.update(jnp.ones(1), state, params, error=jnp.float32(50))
        applied.append(-float(updates[0]))
        assert float(current_learning_rate(schedule, jnp.int32(step), state)) == pytest.approx(applied[-1])
    # Half the weight of the average is in after 35 steps; the first boundary follows as if nothing had been.
    assert applied == pytest.approx([0.01] * 34 + [0.1] * 26 + [0.01] * 10)


PLATEAU = OptimConfig(schedule="plateau", plateau_patience=3, momentum=0.0, weight_decay=0.0)


def after_errors(errors, opt_state, patience=3):
    """The scale of the rate after each of the errors, and the last state."""
    scales = []
    for error in errors:
        opt_state = note_validation_error(opt_state, error, patience=patience)
        scales.append(float(optax.tree.get(opt_state, "scale")))
    return scales, opt_state


def test_a_plateau_divides_the_rate_and_a_lower_error_begins_to_count_anew():
    optimizer = build_optimizer(PLATEAU, build_schedule(PLATEAU, steps=1))
    state = optimizer.init(jnp.zeros(1))
    # The lowest so far is 50; two that are not lower, then one that is, by as little as an image in 50,000.
    scales, state = after_errors([50.0, 50.0, 60.0, 49.998], state)
    assert scales == [1, 1, 1, 1]
    scales, state = after_errors([49.998, 55.0, 70.0], state)  # equal is not lower
    assert scales == pytest.approx([1, 1, 0.1])
    scales, state = after_errors([52.0, 51.0, 50.5, 49.9], state)  # lower than the last is not enough
    assert scales == pytest.approx([0.1, 0.1, 0.01, 0.01])
    other = after_errors([50.0] * 3, optimizer.init(jnp.zeros(1)), patience=2)
    assert other[0] == pytest.approx([1, 1, 0.1])


@pytest.mark.parametrize("style", ["caffe", "torch"])
def test_the_scale_of_a_plateau_is_part_of_the_rate(style):
    config = OptimConfig(
        schedule="plateau", plateau_patience=1, momentum=0.5, momentum_style=style, weight_decay=0.0,
        warmup="steps", warmup_steps=2, warmup_learning_rate=0.01,
    )  # fmt: skip
    schedule = build_schedule(config, steps=6)
    optimizer = build_optimizer(config, schedule)
    params = {"bn": {"scale": jnp.zeros(1)}}  # named like a field of the state
    state = optimizer.init(params)
    expected = [0.01, 0.01, 0.1, 0.01, 0.01, 0.001]
    velocity = 0.0
    for step, rate in enumerate(expected):
        if step in (2, 3, 5):
            state = note_validation_error(state, 50.0, patience=1)  # the first is the lowest so far
        updates, state = optimizer.update({"bn": {"scale": jnp.ones(1)}}, state, params, error=jnp.float32(50))
        velocity = 0.5 * velocity + (rate if style == "caffe" else 1)
        applied = velocity if style == "caffe" else rate * velocity
        assert -float(updates["bn"]["scale"][0]) == pytest.approx(applied), step
        assert float(current_learning_rate(schedule, jnp.int32(step), state)) == pytest.approx(rate), step


def test_the_default_boundaries_are_not_those_of_a_plateau():
    rate = build_schedule(OptimConfig(schedule="plateau", boundaries=(3,)), steps=10)
    assert rates(rate, [0, 9]) == pytest.approx({0: 0.1, 9: 0.1})


def test_noting_an_error_keeps_everything_where_it_is_and_changes_nothing_else():
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    optimizer = build_optimizer(PLATEAU, build_schedule(PLATEAU, steps=1))
    state = jax.device_put(optimizer.init({"fc": {"kernel": jnp.ones(2)}}), replicated)
    after = note_validation_error(state, 50.0, patience=3)
    describe = lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type, leaf.sharding)  # noqa: E731
    assert jax.tree.map(describe, after) == jax.tree.map(describe, state)
    assert float(optax.tree.get(after, "best_value")) == 50
    usual = build_optimizer(OptimConfig(), optax.constant_schedule(0.1))
    other = usual.init({"fc": {"kernel": jnp.ones(2)}})
    jax.tree.map(np.testing.assert_array_equal, note_validation_error(other, 50.0, patience=3), other)


def test_a_checkpoint_holds_the_count_of_evaluations(tmp_path):
    optimizer = build_optimizer(PLATEAU, build_schedule(PLATEAU, steps=1))
    state = create_train_state(optimizer, {"params": {"fc": {"kernel": jnp.ones(2)}}})
    _, opt_state = after_errors([40.0, 50.0, 50.0], state.opt_state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state.replace(opt_state=opt_state))
    checkpoints.wait()
    restored = restore(tmp_path, jax.tree.map(jnp.zeros_like, state)).opt_state
    assert jax.tree.structure(restored) == jax.tree.structure(opt_state)
    jax.tree.map(np.testing.assert_array_equal, restored, opt_state)
    assert after_errors([45.0], restored)[0] == pytest.approx([0.1])  # the third that is not below 40


def test_a_state_of_a_plateau_only_multiplies_in_a_step():
    plateau = reduce_on_plateau(2)
    state = plateau.init(jnp.zeros(1))
    for _ in range(5):
        updates, after = plateau.update(jnp.ones(1), state, error=jnp.float32(50))
        assert float(updates[0]) == 1
        jax.tree.map(np.testing.assert_array_equal, after, state)


def test_what_is_frozen_gets_neither_gradient_nor_decay_nor_momentum():
    config = OptimConfig(weight_decay=0.1)
    optimizer = build_optimizer(config, build_schedule(config, 10), lambda params: {"bn": False, "fc": True})
    params = {"bn": jnp.array([1.0, 2.0]), "fc": jnp.array([3.0])}
    state = optimizer.init(params)
    state = jax.tree.map(lambda leaf: leaf - 1 if leaf.ndim else leaf, state)  # a velocity from before
    before = jax.tree.structure(build_optimizer(config, build_schedule(config, 10)).init(params))
    assert jax.tree.structure(state) == before  # checkpoints do not depend on what is frozen
    for _ in range(3):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params, error=jnp.float32(50))
        params = optax.apply_updates(params, updates)
    assert params["bn"].tolist() == [1, 2]
    # v = 0.9 v + 0.1 (1 + 0.1 w), w = w - v, from v = 1 and w = 3
    w, v = 3.0, 1.0
    for _ in range(3):
        v = 0.9 * v + 0.1 * (1 + 0.1 * w)
        w -= v
    assert params["fc"].tolist() == pytest.approx([w], rel=1e-5)
    assert optax.tree.get(state, "trace")["bn"].tolist() == pytest.approx([-(0.9**3)] * 2)  # of no effect


def test_an_unknown_schedule_is_named():
    with pytest.raises(UserError, match="--optim.schedule cosin: choose steps, plateau, cosine; did you mean cosine"):
        build_schedule(OptimConfig(schedule="cosin"), 10)
