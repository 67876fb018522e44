"""Rates: steps by the time in which the device made them, whether a dispatch blocks its caller or not."""

import dataclasses

import numpy as np
import pytest

from resnet_jax.config import Config, DataConfig, RunConfig
from resnet_jax.metrics import Metrics, StepMetrics, StepsReport
from resnet_jax.run import monitor as monitor_module
from resnet_jax.run.logs import Log
from resnet_jax.run.monitor import Monitor

BATCH, SECONDS_PER_STEP = 10, 0.25  # 40 images/s


class Clock:
    now = 100.0

    def perf_counter(self):
        return self.now


class Count:
    """The number of steps of a dispatch, on the device."""

    def __init__(self, clock, steps, done_at):
        self.clock, self.steps, self.done_at = clock, steps, done_at

    def is_ready(self):
        return self.clock.now >= self.done_at

    def __array__(self, *_, **__):  # what jax.device_get() calls; it waits
        self.clock.now = max(self.clock.now, self.done_at)
        return np.int32(self.steps)


class Device:
    """One that makes a step in SECONDS_PER_STEP; a dispatch to it may return at once, or when it has ended."""

    def __init__(self, clock, *, blocks):
        self.clock, self.blocks, self.free_at = clock, blocks, clock.now

    def dispatch(self, steps):
        self.free_at = max(self.free_at, self.clock.now) + steps * SECONDS_PER_STEP
        if self.blocks:
            self.clock.now = self.free_at
        ones = np.ones(steps, np.float32)
        metrics = Metrics(ones, {"error": ones, "top5_error": ones}, BATCH * ones)
        return StepsReport(Count(self.clock, steps, self.free_at), StepMetrics(metrics, ones, ones, 0 * ones))


class Rates(Log):
    def __init__(self):
        self.rates = {}

    def train(self, step, metrics, numbers):
        self.rates[step] = numbers["images_per_second"]


@dataclasses.dataclass
class Data:
    most_steps = 4
    streamed = False
    train_images = 1000

    def unreadable(self):
        return []


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(monitor_module, "time", clock)
    return clock


@pytest.fixture(params=[True, False], ids=["blocks", "returns at once"])
def run(request, clock):
    """A device, the monitor of a run on it, and the rates that are logged."""
    log = Rates()
    config = Config(data=DataConfig(batch_size=BATCH), run=RunConfig(log_every=8))
    return Device(clock, blocks=request.param), Monitor(0, config, Data(), log), log.rates


def dispatch(run, *steps):
    """Steps up to each of these."""
    device, monitor, _ = run
    for step in steps:
        monitor.add(step, device.dispatch(step - monitor._added))


def test_the_rate_is_that_of_the_device(run, clock):
    dispatch(run, 4, 8, 12, 16, 20, 24)
    run[1].write_all()
    assert run[2] == {8: 40, 16: 40, 24: 40}
    assert clock.now == 100 + 24 * SECONDS_PER_STEP  # the device never waited


def test_what_is_paused_does_not_count(run, clock):
    """An evaluation, a save; also where it is not at the end of a record."""
    _, monitor, rates = run
    dispatch(run, 4, 8)
    monitor.write_all()
    with monitor.paused():
        clock.now += 60
    dispatch(run, 12)
    with monitor.paused():
        clock.now += 60
    dispatch(run, 16, 20, 24)
    monitor.write_all()
    assert rates == {8: 40, 16: 40, 24: 40}


def test_a_host_that_is_late_counts_only_where_the_device_waits_for_it(run, clock):
    device, monitor, rates = run
    dispatch(run, 4)
    clock.now += 0.5
    dispatch(run, 8, 12, 16)
    monitor.write_all()
    assert rates == {8: 80 / 2.5 if device.blocks else 40, 16: 40}


def test_dispatches_that_are_seen_to_be_done_together_share_the_time(run, clock):
    """Neither took all of it, nor none."""
    device, monitor, rates = run
    dispatch(run, 8)
    report = device.dispatch(8)
    clock.now += 5
    monitor.add(16, report)
    monitor.write_all()
    assert rates == ({8: 40, 16: pytest.approx(80 / 7, abs=0.1)} if device.blocks else {8: 32, 16: 32})


def test_what_was_read_is_done_though_a_device_does_not_say_so(run, monkeypatch):
    """Of several devices the first is read, and the others may take a moment longer."""
    monkeypatch.setattr(Count, "is_ready", lambda _: False)
    device, monitor, rates = run
    device.blocks = False
    dispatch(run, 8, 16, 24)
    monitor.write_all()
    assert rates == {8: 40, 16: 40, 24: 40}


def test_dispatches_are_as_long_as_the_steps_allow(run):
    _, monitor, _ = run
    assert monitor.steps_at_once(0) == 1  # nothing is known yet
    dispatch(run, 1)
    monitor.write_all()
    assert monitor.steps_at_once(1) == 4
    assert monitor.steps_at_once(7) == 1  # up to the next record
    monitor._seconds_per_step = 1.5
    assert monitor.steps_at_once(1) == 2  # about three seconds
