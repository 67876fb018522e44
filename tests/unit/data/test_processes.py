"""Worker processes: results in order, and an end without delay when one of them fails."""

from __future__ import annotations

import time

import pytest
from endless_task import fail_or_go_on

from resnet_jax.data.processes import run_tasks
from resnet_jax.errors import UserError


def test_one_process_is_this_one() -> None:
    done: list[int] = []

    def task(number: int, advance: object) -> int:
        done.append(number)
        return number**2

    results = run_tasks(task, [3, 1, 2], workers=1, title="", images=3)
    assert next(results) == 9
    assert done == [3]  # nothing is done before it is asked for
    assert list(results) == [1, 4]


def test_others_end_when_one_fails() -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match="^the first task fails$"):
        list(run_tasks(fail_or_go_on, [0, 1, 2, 3], workers=2, title="", images=1800))
    assert time.monotonic() - start < 30
