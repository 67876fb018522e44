"""Finish what is being done when a signal asks to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import types

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """While it is entered, SIGINT and SIGTERM only set `signum`, the first that came, or 0.

    A second SIGINT ends the process at once. Further SIGTERMs change nothing: a scheduler may send several, and what
    is being saved must not be cut short.

    Python runs handlers between two instructions of its main thread, which may sit in a compiled program for a long
    time; so a thread of its own hears of signals.
    """

    def __init__(self) -> None:
        self.signum = 0

    def __enter__(self) -> StopSignal:
        self._entered = threading.current_thread() is threading.main_thread()  # others may not set handlers
        if self._entered:
            self._previous = {signum: signal.signal(signum, _ignore) for signum in _SIGNALS}
            self._reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            self._previous_fd = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            self._listener = threading.Thread(target=self._listen, daemon=True, name="stop_signal")
            self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._entered:
            signal.set_wakeup_fd(self._previous_fd)
            for signum, handler in self._previous.items():
                signal.signal(signum, handler)
            os.close(self._writing)  # which ends the listener
            self._listener.join()
            os.close(self._reading)

    def _listen(self) -> None:
        interrupted = False
        while byte := os.read(self._reading, 1):
            signum = byte[0]
            if signum not in _SIGNALS:
                continue
            self.signum = self.signum or signum
            if signum == signal.SIGINT:
                if interrupted:
                    os._exit(128 + signum)  # sys.exit would wait for what is being saved
                interrupted = True
                _tell()


def _ignore(signum: int, frame: types.FrameType | None) -> None:
    """Keep the system from ending the process."""


def _tell() -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no standard error
        if os.isatty(sys.stderr.fileno()):
            # With the terminal's cursor, which the progress bar may have hidden.
            text = "\x1b[?25h\nstopping and saving; Ctrl-C again leaves at once, without saving\n"
            os.write(sys.stderr.fileno(), text.encode())
