"""The long run: what it sees of a process, that it notices growth, and a short one."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys

import pytest

from reliability.long_run import PARTS, Limits, find_growth, last_step, main, summarize, watch
from reliability.usage import Sample, children, look
from resnet_jax.errors import CommandError, UserError

STEPS = 1000


def run(*, memory=0.0, files=0, threads=0, slower=0.0):
    """A run of 1,000 steps with a large warm-up, whose quantities then grow evenly by so much in all."""
    samples, records, clock = [], [{"kind": "start", "step": 0, "time": 50.0}], 50.0
    for step in range(0, STEPS + 1, 10):
        late = max(0.0, (step / STEPS - 0.15) / 0.8)  # 0 in the second part, 1 in the last
        spike = step % 50 == 0  # an evaluation
        used = 500 * 2**20 * (1 + memory * late) * (0.5 if step < 100 else 1)
        opened, started = 8 + round(files * late) + 3 * spike, 20 + round(threads * late) + spike
        clock += 0.8 * (1 + slower * late)
        samples.append(Sample(step, int(used), opened, started, cpu_seconds=2 * clock))
        if step:
            rate = 100 / (1 + slower * late)
            records.append({"kind": "train", "step": step, "time": clock, "images_per_second": rate})
    return summarize(samples, records, STEPS)


def test_a_flat_run_has_no_problem():
    parts = run()
    assert len(parts) == PARTS
    assert find_growth(parts, Limits()) == []
    assert (parts[4].files, parts[4].threads) == (8, 20)
    assert parts[4].memory == pytest.approx(500)
    assert parts[4].images_per_second == pytest.approx(100)
    assert parts[4].seconds == pytest.approx(8)
    assert parts[4].cpu_seconds == pytest.approx(16)
    assert parts[0].memory == pytest.approx(250)  # the warm-up does not count


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        ({"memory": 0.08}, r"memory grew by [5-9].\d % \(limit 5 %\)"),
        ({"files": 12}, "open files grew from 8 to 19"),
        ({"threads": 4}, "threads grew from 20 to 24"),
        ({"slower": 0.5}, r"a step takes \d\d.\d % longer \(limit 20 %\)"),
    ],
)
def test_growth_is_noticed(growth, message):
    problems = find_growth(run(**growth), Limits())
    assert re.match(message, problems[0])
    assert len(problems) == (3 if "slower" in growth else 1)  # by the clock, with evaluations, and of processor time
    assert find_growth(run(**growth), Limits(memory=20, files=12, threads=5, slower=100)) == []


def test_growth_is_not_hidden_by_memory_that_is_given_back():
    parts = run(memory=0.08)
    parts[1] = dataclasses.replace(parts[1], memory=2 * parts[1].memory)
    assert find_growth(parts, Limits())[0].startswith("memory grew by ")


def test_growth_that_is_no_leak_is_not_noticed():
    assert find_growth(run(memory=0.04, threads=2, slower=0.1), Limits()) == []


def test_a_part_that_nobody_saw_is_an_error():
    with pytest.raises(CommandError, match="part 2 of 10 of the run was not seen"):
        summarize([Sample(0, 1, 1, 1, 1.0)], [{"kind": "train", "step": 1, "time": 1.0, "images_per_second": 1.0}], 10)


PROGRAM = """
import subprocess, sys, threading, time
depth = int(sys.argv[1])
files = [open("/dev/null") for _ in range(7)]
threading.Thread(target=time.sleep, args=[60], daemon=True).start()
memory = bytearray(64 << 20)
memory[::4096] = b"x" * len(memory[::4096])
if depth:
    subprocess.Popen([sys.executable, "-c", sys.argv[2], str(depth - 1), sys.argv[2]])
else:
    print("ready", flush=True)
time.sleep(60)
"""


def test_a_process_is_seen_with_its_children():
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, "1", PROGRAM], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        sample = look(process.pid, step=3)
    finally:
        for pid in [*children(process.pid), process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert sample.step == 3
    assert sample.threads == 4
    assert sample.files == 2 * (7 + 3)
    assert 128 << 20 < sample.memory < 170 << 20
    assert 0 < sample.cpu_seconds < 5
    assert look(process.pid, step=3) is None


def test_the_last_step_is_that_of_the_last_whole_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) is None
    path.write_text('{"kind": "train", "step": 1' + " " * 5000 + '}\n{"step": 7}\n{"ste')
    assert last_step(path) == 7


def test_too_few_steps_are_refused():
    with pytest.raises(UserError, match="--steps must be at least 200; got 100"):
        main(["--steps", "100"])


def test_a_short_run_opens_no_more_and_more_files_and_threads(tmp_path, monkeypatch):
    steps = 300
    every = "--run.log-every 10 --run.eval-every 20 --run.save-every 20"  # often enough for a leak to be seen
    monkeypatch.setattr("reliability.long_run._RESIDENT", every)
    samples, records = watch(tmp_path, steps, streamed=False)
    assert sum(record["kind"] == "test" for record in records) == steps // 20
    assert sum(record["kind"] == "train" for record in records) == steps // 10
    parts = summarize(samples, records, steps)
    # Half of so short a run is warm-up: pools of threads grow to their size, fonts are opened.
    from_half = [parts[0], parts[PARTS // 2], *parts[PARTS // 2 + 1 :]]
    limits = Limits(memory=10, files=2, threads=2, slower=300)
    assert find_growth(from_half, limits) == []


def test_a_run_that_fails_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("reliability.long_run._TINY", "--model.depht 8")
    with pytest.raises(CommandError, match="train.py ended with 2: .*depht"):
        watch(tmp_path, 300, streamed=False)
