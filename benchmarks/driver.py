"""Measure the peers of a case: all workers alive at once, one at work at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.process import Worker, WorkerError

ROUND_SECONDS = {"cpu": 1.5, "gpu": 0.5}  # of work for a peer in a round
OUT_OF_TIME = "not run: out of time"
CUT_SHORT = "cut short: out of time"


def seconds_to_measure(case: Case, rounds: int) -> float:
    """Return how long the rounds of a case may take once its workers are ready, rather too long than too short."""
    return 2 * ROUND_SECONDS[case.platform] * (rounds + 1) * len(case.peers)


class _Contest:
    """The workers of a case that are still in, and the results of all."""

    def __init__(self, case: Case, deadline: float):
        self._case, self._deadline = case, deadline
        self.workers: dict[str, Worker] = {}
        self.results: dict[str, dict[str, Any]] = {peer: {"status": OUT_OF_TIME, "ms": []} for peer in case.peers}

    def ask(self, peer: str, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and return its reply; see receive."""
        self.workers[peer].send(do, **arguments)
        return self.receive(peer, self._deadline)

    def receive(self, peer: str, deadline: float) -> dict[str, Any]:
        """Return a worker's reply, or {} if there is none: then it is noted why, and the worker is out."""
        until = min(time.monotonic() + self._case.timeout, deadline)
        try:
            return self.workers[peer].receive(until)
        except WorkerError as error:
            result = self.results[peer]
            late = error.status == "timeout" and until == deadline
            out_of_time = CUT_SHORT if result["ms"] else OUT_OF_TIME
            result |= {"status": out_of_time if late else error.status, "detail": error.detail}
            self.workers.pop(peer).close()
            return {}


def run_case(
    case: Case, *, rounds: int, deadline: float, logs: Path, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Measure every peer of a case in turn, round by round.

    Args:
      case: what to measure.
      rounds: how often every peer has its turn, at most.
      deadline: of time.monotonic(); what is not done by then is given up.
      logs: folder for what the workers print.
      say: takes a line on the progress.

    Returns:
      By peer: "status" ("ok", or why it is not complete), "detail", "ms" (per step, of each round), and as far as it
      came "steps" (of a round), "compile_seconds", "settings", "peak_host_bytes", "peak_device_bytes", "roofline".
    """
    rounds = 1 if case.single_step else min(rounds, case.rounds or rounds)
    contest = _Contest(case, deadline)
    workers, results = contest.workers, contest.results
    with contextlib.ExitStack() as stack:
        # So early that the others can still be measured where one takes long.
        ready_by = deadline - seconds_to_measure(case, rounds)
        for peer in case.peers:
            workers[peer] = stack.enter_context(Worker(case, peer, log=logs / f"{case.name}.{peer}.log"))
            workers[peer].send("prepare")
            if case.platform == "cpu":  # else they compile at the same time: hosts of GPUs have many cores
                results[peer] |= contest.receive(peer, ready_by)
        for peer in list(workers) if case.platform == "gpu" else ():
            results[peer] |= contest.receive(peer, ready_by)
        say(f"  ready: {', '.join(workers) or 'nobody'}")

        for peer in list(workers):
            seconds = ROUND_SECONDS[case.platform]
            results[peer] |= {"calls": 1} if case.single_step else contest.ask(peer, "calibrate", seconds=seconds)
        for number in range(1, rounds + 1):
            for peer in list(workers):
                if reply := contest.ask(peer, "time", calls=results[peer]["calls"]):
                    results[peer]["steps"] = reply["steps"]
                    results[peer]["ms"].append(1000 * reply["seconds"] / reply["steps"])
            figures = (f"{peer} {results[peer]['ms'][-1]:.4g}" for peer in workers)
            say(f"  round {number}, ms a step: {', '.join(figures)}")
        for peer in list(workers):
            if reply := contest.ask(peer, "finish"):
                results[peer] |= {"status": "ok", **reply}
        for peer in set(workers) - {"ours"}:  # which hold memory
            workers.pop(peer).close()
        if case.roofline and "ours" in workers:
            results["ours"]["roofline"] = contest.ask("ours", "roofline")
    return results
