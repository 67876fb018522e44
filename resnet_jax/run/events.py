"""TensorBoard's event files, written by the calling thread."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog


class EventFile:
    """Scalars for TensorBoard.

    tensorboardX's SummaryWriter hands events to a thread, which ends when the disk is full; the next flush then waits
    for ever. Here the caller gets the OSError.
    """

    def __init__(self, folder: Path, *, purge_step: int | None = None):
        """Begin a new file; what older files have from `purge_step` on is hidden."""
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(
            str(folder / "events"), filename_suffix=f".{time.time_ns()}"
        )  # two may begin in one second
        if purge_step is not None:
            self._writer.write_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self._writer.flush()

    def write(self, step: int, wall_time: float, scalars: Mapping[str, float]) -> None:
        """Append values, each by its tag, and flush them."""
        for tag, value in scalars.items():
            self._writer.write_event(Event(step=step, wall_time=wall_time, summary=summary.scalar(tag, value)))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
