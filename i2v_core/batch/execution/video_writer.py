"""Writing a video in its own thread, while the device goes on with the next job."""

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

_MAX_QUEUED_CHUNKS = 8
"""Decoded chunks that wait to be written; more would only take host memory."""
_THUMBNAIL_PIXELS = 256
_POLL_SECONDS = 0.1


class _AbandonedError(Exception):
    """The frames will not all come."""


class AsyncVideoWriter:
    """Writes a job's frames as they are decoded.

    Args:
        on_written: called once after `finish`, from the writing thread or from `finish`, with the error or None.
        on_thumbnail: called with a small copy of the first frame.
    """

    def __init__(
        self,
        job: RunningJob,
        on_written: Callable[[Exception | None], None],
        on_thumbnail: Callable[[RunningJob, Image.Image], None],
    ) -> None:
        self._job, self._on_written, self._on_thumbnail = job, on_written, on_thumbnail
        self._chunks: queue.Queue[Tensor | Exception | None] = queue.Queue(_MAX_QUEUED_CHUNKS)
        self._error: Exception | None = None
        self._lock = threading.Lock()
        self._all_queued = self._ended = False
        self._thread = threading.Thread(target=self._write, name=f"write {job.id}", daemon=True)
        self._thread.start()

    def put(self, frames_FHWC: Tensor) -> None:
        """Queues frames; waits while the queue is full. Raises the writing thread's error, or `StopJobError`."""
        self._put(frames_FHWC, self._job.check)

    def finish(self) -> None:
        """Ends the video after the frames that are queued. Does not wait for it to be written."""
        self._job.decoded_at = time.monotonic()
        self._put(None, self._job.check)
        with self._lock:
            self._all_queued, ended = True, self._ended
        if ended:
            self._on_written(self._error)

    def abandon(self) -> None:
        """Leaves no file behind. To be called in place of `finish`."""
        with suppress(Exception):
            self._put(_AbandonedError(), lambda: None)
        self._thread.join()

    def _put(self, item: Tensor | Exception | None, check: Callable[[], None]) -> None:
        while True:
            check()
            if self._error is not None:
                raise self._error
            with suppress(queue.Full):
                self._chunks.put(item, timeout=_POLL_SECONDS)
                return

    def _write(self) -> None:
        job = self._job
        try:
            with open_video(job.output, job.spec.video, {"i2v_job": job.spec.key}) as sink:
                self._write_chunks(sink)
                # Written before the video gets its final name: a video that is there has its report.
                stages = tuple(report.as_dict() for report in job.reports)
                write_run_report(job.output, RunReport(plan=job.plan, stages=stages))
        except Exception as error:
            self._error = error
        with self._lock:
            self._ended, all_queued = True, self._all_queued
        if all_queued:
            self._on_written(self._error)

    def _write_chunks(self, sink: VideoSink) -> None:
        while (item := self._chunks.get()) is not None:
            if isinstance(item, Exception):
                raise item
            if not sink.frames:
                pixels: Any = next(each_frame(item))
                first = Image.fromarray(pixels)
                first.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
                self._on_thumbnail(self._job, first)
            sink.write(item)
