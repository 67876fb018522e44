"""Finish what is being done when a signal asks to stop."""

from __future__ import annotations

import signal
import threading
import types


class StopSignal:
    """While it is entered, SIGINT and SIGTERM only set `signum`; a second one acts as usual."""

    def __init__(self) -> None:
        self.signum = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        self._previous = {}

    def _handle(self, signum: int, frame: types.FrameType | None) -> None:
        del frame
        self.signum = signum
        self.__exit__()
