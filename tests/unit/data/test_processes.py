"""Tasks in this process; tests/system has those in others."""

from __future__ import annotations

from resnet_jax.data.processes import run_tasks


def test_one_process_is_this_one() -> None:
    done: list[int] = []

    def task(number: int, advance: object) -> int:
        done.append(number)
        return number**2

    results = run_tasks(task, [3, 1, 2], workers=1, images=3)
    assert next(results) == 9
    assert done == [3]  # nothing is done before it is asked for
    assert list(results) == [1, 4]
