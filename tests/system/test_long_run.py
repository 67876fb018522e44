"""The long run: what it sees of a process, that it notices growth, and a short one."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from reliability.long_run import PARTS, Limits, Usage, find_growth, look, summarize, watch

STEPS = 1000


def run(*, memory=0.0, files=0, threads=0, slower=0.0):
    """A run of 1,000 steps with a large warm-up, whose quantities then grow evenly by so much in all."""
    samples, records, clock = [], [{"kind": "start", "step": 0, "time": 50.0}], 50.0
    for step in range(10, STEPS + 1, 10):
        late = max(0.0, (step / STEPS - 0.15) / 0.8)  # 0 in the second part, 1 in the last
        spike = step % 50 == 0  # an evaluation
        used = 500 * (1 + memory * late) * (0.5 if step <= 100 else 1)
        clock += 0.8 * (1 + slower * late)
        samples.append((clock, Usage(used, 8 + round(files * late) + 3 * spike, 20 + round(threads * late) + spike)))
        rate = 100 / (1 + slower * late)
        records.append({"kind": "train", "step": step, "time": clock, "images_per_second": rate})
    return summarize(samples, records, STEPS)


def test_a_flat_run_has_no_problem():
    parts = run()
    assert len(parts) == PARTS
    assert find_growth(parts, Limits()) == []
    assert parts[4] == (500, 8, 20, 100)
    assert parts[0].memory == 250  # the warm-up does not count


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        ({"memory": 0.08}, r"memory grew by 8\.0 % \(limit 5 %\)"),
        ({"files": 12}, "open files grew from 8 to 19"),
        ({"threads": 4}, "threads grew from 20 to 24"),
        ({"slower": 0.5}, r"a step takes 49\.8 % longer \(limit 20 %\)"),
    ],
)
def test_growth_is_noticed(growth, message):
    (problem,) = find_growth(run(**growth), Limits())
    assert re.match(message, problem)
    assert find_growth(run(**growth), Limits(memory=20, files=12, threads=5, slower=100)) == []


def test_growth_is_not_hidden_by_memory_that_is_given_back():
    parts = run(memory=0.08)
    parts[1] = parts[1]._replace(memory=2 * parts[1].memory)
    assert find_growth(parts, Limits())[0].startswith("memory grew by ")


def test_growth_that_is_no_leak_is_not_noticed():
    assert find_growth(run(memory=0.04, threads=2, slower=0.1), Limits()) == []


def test_a_part_that_nobody_saw_is_an_error():
    with pytest.raises(RuntimeError, match="part 1 of 10 of the run was not seen"):
        summarize([], [{"kind": "train", "step": 1, "time": 1.0, "images_per_second": 1.0}], 10)


PROGRAM = """
import subprocess, sys, threading, time
depth = int(sys.argv[1])
files = [open("/dev/null") for _ in range(7)]
threading.Thread(target=time.sleep, args=[60], daemon=True).start()
memory = bytearray(64 << 20)
memory[::4096] = b"x" * len(memory[::4096])
if depth:
    subprocess.run([sys.executable, "-c", sys.argv[2], str(depth - 1), sys.argv[2]])
else:
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_process_is_seen_with_its_children():
    command = [sys.executable, "-c", PROGRAM, "1", PROGRAM]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        used = look(process.pid)
        process.communicate()
    assert used.threads == 4
    assert used.files == 2 * (7 + 3)
    assert 128 < used.memory < 170
    assert look(process.pid) is None


@pytest.mark.slow
def test_a_short_run_opens_no_more_and_more_files_and_threads(tmp_path):
    # Often enough for a leak to be seen.
    often = ["--run.log-every", "10", "--run.eval-every", "20", "--run.save-every", "20"]
    parts = watch(tmp_path, 200, options=often)
    # Half of so short a run is warm-up: pools of threads grow to their size, fonts are opened.
    from_half = [parts[0], *parts[PARTS // 2 :]]
    assert find_growth(from_half, Limits(memory=10, files=2, threads=2, slower=300)) == []


def test_a_run_that_fails_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="train.py ended with 2: .*depht"):
        watch(tmp_path, 300, options=["--model.depht", "8"])
