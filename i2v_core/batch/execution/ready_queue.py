"""Jobs of one device between the store's queue and sampling."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .running_job import RunningJob


class ReadyQueue:
    """Encoded jobs in the order in which they were taken up. Its methods are called from the pipeline's threads.

    At most `max_in_flight` jobs are between the store's queue and their file, one of them encoded ahead. Where several
    are sampled together (`set_batch_hint`), as many are encoded ahead, and more may be in flight to allow for it.
    """

    def __init__(self, max_in_flight: int) -> None:
        self._changed = threading.Condition()
        self._max_in_flight, self._in_flight = max_in_flight, 0
        self._encode_ahead, self._encoding = 1, 0
        self._ready: list[RunningJob] = []
        self._sampling = self._idle = self._ended = False

    def wait_for_room(self) -> None:
        """Waits until one more job may be taken up, and reserves its place until `push`."""
        self.set_idle(True)
        with self._changed:
            self._changed.wait_for(self._has_room)
            self._in_flight += 1
            self._encoding += 1
            self._idle = False

    def set_idle(self, idle: bool) -> None:
        """Says whether nothing is being encoded, for lack of room or of jobs."""
        with self._changed:
            self._idle = idle
            self._changed.notify_all()

    def push(self, job: RunningJob | None) -> None:
        """Adds the job whose place was reserved; None gives the place back: it failed."""
        with self._changed:
            self._encoding -= 1
            if job is not None:
                self._ready.append(job)
            self._changed.notify_all()

    def end(self) -> None:
        """Says that no more jobs will come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def on_finished(self) -> None:
        """Counts a job as no longer in flight."""
        with self._changed:
            self._in_flight -= 1
            self._changed.notify_all()

    def pop(self) -> RunningJob | None:
        """The next job to sample. Waits for one; None when there will be none. Ends the sampling of the one before."""
        with self._changed:
            self._sampling = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready or self._ended)
            if not self._ready:
                return None
            self._sampling = True
            return self._ready.pop(0)

    def wait_for_matching(self, matches: Callable[[RunningJob], bool], count: int) -> int:
        """Wait for `count` matching jobs, or until no more can be had now; the number that is ready."""

        def matching() -> int:
            return sum(map(matches, self._ready))

        with self._changed:
            self._changed.wait_for(lambda: matching() >= count or self._idle or self._ended)
            return matching()

    def take_matching(self, matches: Callable[[RunningJob], bool], count: int) -> list[RunningJob]:
        """Removes the first `count` matching jobs, and returns them."""
        with self._changed:
            taken = [job for job in self._ready if matches(job)][:count]
            self._ready = [job for job in self._ready if job not in taken]
            self._changed.notify_all()
        return taken

    def set_batch_hint(self, clips: int) -> None:
        """Says how many are likely to be sampled together next."""
        with self._changed:
            self._encode_ahead = clips
            self._changed.notify_all()

    def _has_room(self) -> bool:
        # Before anything is sampled, a batch for now and one to follow it; then the one to follow.
        encode_ahead = self._encode_ahead if self._sampling else 2 * self._encode_ahead
        max_in_flight = max_jobs(self._max_in_flight, self._encode_ahead)
        return self._encoding + len(self._ready) < encode_ahead and self._in_flight < max_in_flight


def max_jobs(max_in_flight: int, clips: int) -> int:
    """The most jobs in flight where `clips` are sampled together: two batches in place of two jobs."""
    return max_in_flight + 2 * (clips - 1)
