"""Schedules and SGD, step by step against plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.optim import current_learning_rate, sgd, step_schedule, warm_up_until_error


def test_the_rate_of_the_paper_at_every_boundary():
    rate = step_schedule(0.1, (32_000, 48_000))
    expected = {0: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001, 63_999: 0.001}
    assert {step: float(rate(step)) for step in expected} == pytest.approx(expected, rel=1e-7)


def test_the_fixed_warm_up_of_resnet110_returns_to_the_full_rate():
    rate = step_schedule(0.1, (32_000, 48_000), warmup_learning_rate=0.01, warmup_steps=400)
    expected = {0: 0.01, 399: 0.01, 400: 0.1, 31_999: 0.1, 32_000: 0.01, 48_000: 0.001}
    assert {step: float(rate(step)) for step in expected} == pytest.approx(expected, rel=1e-7)


def test_no_boundaries_is_a_constant_rate():
    assert float(step_schedule(0.1, ())(10**6)) == pytest.approx(0.1)


@pytest.mark.parametrize("boundaries", [(2, 2), (3, 2), (0,), (300, 500)])
def test_boundaries_must_increase(boundaries):
    with pytest.raises(ValueError, match="must increase"):
        step_schedule(0.1, boundaries, warmup_learning_rate=0.01, warmup_steps=400)


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
    optimizer = sgd(schedule, momentum=0.0, weight_decay=0.0, warm_up=warm_up_until_error(80.0, 0.1))
    params = jnp.zeros(1)
    state = optimizer.init(params)
    rates = []
    for step in range(70):
        updates, state = optimizer.update(jnp.ones(1), state, params, error=jnp.float32(50))
        rates.append(-float(updates[0]))
        assert float(current_learning_rate(schedule, jnp.int32(step), state)) == pytest.approx(rates[-1])
    # Half the weight of the average is in after 35 steps; the first boundary follows as if nothing had been.
    assert rates == pytest.approx([0.01] * 34 + [0.1] * 26 + [0.01] * 10)
