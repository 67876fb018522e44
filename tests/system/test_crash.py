"""A run killed twice with SIGKILL, once while it saves, ends with the bits of an undisturbed one."""

import time

from reliability.crash import crash


def test_a_killed_run_loses_nothing(tmp_path):
    seed = time.time_ns()
    print("seed", seed)
    kills = crash(tmp_path, kills=2, processes=1, seed=seed, save_every=10)
    assert [kill.moment for kill in kills] == ["saving", "training"]
