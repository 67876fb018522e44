"""A run killed with SIGKILL at random moments, many while it saves, ends with the bits of an undisturbed one."""

import time

import pytest

from reliability.crash import crash


def test_a_killed_run_loses_nothing(tmp_path):
    seed = time.time_ns()
    print("seed", seed)
    kills = crash(tmp_path, kills=3, processes=1, seed=seed)
    assert [kill.moment for kill in kills] == ["saving", "saving", "training"]


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "processes"), [(50, 1), (10, 2)])
def test_many_kills(tmp_path, kills, processes):
    assert len(crash(tmp_path, kills=kills, processes=processes, seed=time.time_ns())) == kills
