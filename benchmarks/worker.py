"""A process that measures one peer of one case; it answers JSON lines with JSON lines.

    {"do": "prepare"}                   -> {"compile_seconds": 3.2, "settings": {...}}
    {"do": "calibrate", "seconds": 1.5} -> {"calls": 40}
    {"do": "time", "calls": 40}         -> {"seconds": 1.52, "steps": 40}
    {"do": "finish"}                    -> {"peak_host_bytes": ..., "peak_device_bytes": ...}
    {"do": "roofline"}                  -> see roofline.measure

A reply {"error": "a word or two", "detail": "..."} means that it failed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from typing import Any

from benchmarks.cases import Case
from benchmarks.peer import Prepared, UnavailableError, peak_host_bytes

_OURS: dict[str, dict[str, bool]] = {
    "ours": {},
    "ours-single": {"single": True},
    "ours-scan": {"scan_blocks": True},
    "ours-scan-remat": {"scan_blocks": True, "remat": True},
}


def prepare(case: Case, peer: str) -> Prepared:
    """Import the peer's library and prepare it.

    Raises:
      UnavailableError: it is not installed, or has no GPU where the case wants one.
    """
    if peer in _OURS:
        from benchmarks import ours

        return ours.prepare(case, **_OURS[peer])
    if peer == "flax":
        from benchmarks import plain_flax

        return plain_flax.prepare(case)
    if importlib.util.find_spec("torch") is None:
        raise UnavailableError("not installed")
    from benchmarks import torch_peer

    return torch_peer.prepare(case, compiled=peer == "torch-compile")


def timed(prepared: Prepared, calls: int) -> float:
    """Return the seconds that so many calls take, from an idle device to an idle device."""
    began = time.perf_counter()
    prepared.run(calls)
    return time.perf_counter() - began


def calibrate(prepared: Prepared, seconds: float) -> int:
    """Warm up, and return how many calls take about that many seconds."""
    calls, taken = 1, timed(prepared, 1)
    if taken < 2 * seconds:  # else one call is a round, also where the first was slower than the others
        taken = timed(prepared, 1)
    while taken < seconds / 4:
        calls = min(max(round(calls * seconds / 2 / taken), calls + 1), 10 * calls)
        taken = timed(prepared, calls)
    return max(1, round(calls * seconds / taken))


class _Worker:
    def __init__(self, case: Case, peer: str):
        self._case, self._peer = case, peer
        self._prepared: Prepared | None = None

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked."""
        if request["do"] == "prepare":
            self._prepared = prepare(self._case, self._peer)
            return {"compile_seconds": self._prepared.compile_seconds, "settings": self._prepared.settings}
        prepared = self._prepared
        if prepared is None:
            raise UnavailableError("not prepared")
        if request["do"] == "calibrate":
            return {"calls": calibrate(prepared, request["seconds"])}
        if request["do"] == "time":
            if not self._case.single_step:
                prepared.run(1)  # memory that was given back while the others worked is slow at first
            return {"seconds": timed(prepared, request["calls"]), "steps": request["calls"] * prepared.steps_per_call}
        if request["do"] == "roofline":
            return prepared.roofline() if prepared.roofline else {}
        return {"peak_host_bytes": peak_host_bytes(), "peak_device_bytes": prepared.peak_device_bytes()}


def _in_a_word(error: Exception) -> str:
    if isinstance(error, UnavailableError):
        return str(error)
    text = f"{type(error).__name__} {error}"
    if isinstance(error, MemoryError) or any(s in text for s in ("RESOURCE_EXHAUSTED", "OutOfMemory", "out of memory")):
        return "out of memory"
    return type(error).__name__


def main(peer: str, case: str) -> None:
    """Serve requests from standard input until it ends; `case` is a Case as JSON."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the replies
    fields = json.loads(case)
    worker = _Worker(Case(**{**fields, "peers": tuple(fields["peers"])}), peer)
    for line in sys.stdin:
        try:
            reply = worker.reply(json.loads(line))
        except Exception as error:  # whatever a library raises becomes a cell of the table
            traceback.print_exc()
            detail = (str(error).strip().splitlines() or [""])[0]
            reply = {"error": _in_a_word(error), "detail": f"{type(error).__name__}: {detail}"[:300]}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
