"""A video that is written in a thread of its own, while the device goes on with something else."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from PIL import Image
from torch import Tensor

from ...run_report import RunReport, write_run_report
from ...video import VideoSink, open_video
from ...video.frames import each_frame
from .running_job import RunningJob

_CHUNKS_AHEAD = 8
"""Of frames that are decoded and not yet written: more would be host memory for nothing."""
_THUMBNAIL_PIXELS = 256
_LOOK_AGAIN_SECONDS = 0.1


class _AbandonedError(Exception):
    """The frames will not all come."""


class AsyncVideoWriter:
    """Takes a flight's frames. After `finish`, `landed` is called from the writing thread, with what went wrong."""

    def __init__(
        self,
        flight: RunningJob,
        landed: Callable[[Exception | None], None],
        show: Callable[[RunningJob, Image.Image], None],
    ) -> None:
        self._flight, self._landed, self._show = flight, landed, show
        self._chunks: queue.Queue[Tensor | Exception | None] = queue.Queue(_CHUNKS_AHEAD)
        self._error: Exception | None = None
        self._turn = threading.Lock()
        self._handed_over = self._over = False
        self._thread = threading.Thread(target=self._write, name=f"write {flight.id}", daemon=True)
        self._thread.start()

    def put(self, frames_FHWC: Tensor) -> None:
        """Waits while too many are under way. Raises what the writing raised, or the flight's `StopJobError`."""
        self._put(frames_FHWC, self._flight.check)

    def finish(self) -> None:
        """All frames are there; the rest goes on by itself."""
        self._flight.handed_over = time.monotonic()
        self._put(None, self._flight.check)
        with self._turn:
            self._handed_over, over = True, self._over
        if over:
            self._landed(self._error)

    def abandon(self) -> None:
        """Leaves nothing behind. To be called in place of `finish`."""
        with suppress(Exception):
            self._put(_AbandonedError(), lambda: None)
        self._thread.join()

    def _put(self, item: Tensor | Exception | None, check: Callable[[], None]) -> None:
        while True:
            check()
            if self._error is not None:
                raise self._error
            with suppress(queue.Full):
                self._chunks.put(item, timeout=_LOOK_AGAIN_SECONDS)
                return

    def _write(self) -> None:
        flight = self._flight
        try:
            with open_video(flight.output, flight.spec.video, {"i2v_job": flight.spec.key}) as sink:
                self._take_all(sink)
                # Beside the video before that has its name: a video that is there has its report.
                stages = tuple(report.as_dict() for report in flight.reports)
                write_run_report(flight.output, RunReport(plan=flight.plan, stages=stages))
        except Exception as error:
            self._error = error
        with self._turn:
            self._over, handed_over = True, self._handed_over
        if handed_over:
            self._landed(self._error)

    def _take_all(self, sink: VideoSink) -> None:
        while (item := self._chunks.get()) is not None:
            if isinstance(item, Exception):
                raise item
            if not sink.frames:
                pixels: Any = next(each_frame(item))
                first = Image.fromarray(pixels)
                first.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
                self._show(self._flight, first)
            sink.write(item)
