"""Jobs of one device on their way from the queue to sampling."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .running_job import RunningJob


class ReadyQueue:
    """Keeps the order in which jobs were taken. Its methods are called from the lanes' threads.

    At most `max_in_flight` jobs are between the queue and their file, one of them encoded ahead; where several are
    sampled together (`expect`), as many are encoded ahead, and there are more in hand for that.
    """

    def __init__(self, max_in_flight: int) -> None:
        self._changed = threading.Condition()
        self._max_in_flight, self._in_flight = max_in_flight, 0
        self._ahead, self._coming = 1, 0
        self._ready: list[RunningJob] = []
        self._sampling = self._idle = self._ended = False

    def wait_for_room(self) -> None:
        """Until one more job may be taken from the queue, which counts as coming from then on."""
        self.set_idle(True)
        with self._changed:
            self._changed.wait_for(self._has_room)
            self._in_flight += 1
            self._coming += 1
            self._idle = False

    def set_idle(self, idle: bool) -> None:
        """Whether nothing is being made ready: there is no room, or no job."""
        with self._changed:
            self._idle = idle
            self._changed.notify_all()

    def push(self, flight: RunningJob | None) -> None:
        """What was coming is encoded, or (None) will not come."""
        with self._changed:
            self._coming -= 1
            if flight is not None:
                self._ready.append(flight)
            self._changed.notify_all()

    def end(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def on_finished(self) -> None:
        """A job is in hand no more."""
        with self._changed:
            self._in_flight -= 1
            self._changed.notify_all()

    def pop(self) -> RunningJob | None:
        """The job that is sampled next, when the last has been; waits for it, None when there will be none."""
        with self._changed:
            self._sampling = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready or self._ended)
            if not self._ready:
                return None
            self._sampling = True
            return self._ready.pop(0)

    def wait_for_matching(self, is_alike: Callable[[RunningJob], bool], most: int) -> int:
        """How many such jobs are encoded and wait, once there are so many, or no more to be had now."""

        def count() -> int:
            return sum(map(is_alike, self._ready))

        with self._changed:
            self._changed.wait_for(lambda: count() >= most or self._idle or self._ended)
            return count()

    def take_matching(self, is_alike: Callable[[RunningJob], bool], most: int) -> list[RunningJob]:
        """The first of such jobs, which wait no more."""
        with self._changed:
            joining = [it for it in self._ready if is_alike(it)][:most]
            self._ready = [it for it in self._ready if it not in joining]
            self._changed.notify_all()
        return joining

    def set_batch_hint(self, clips: int) -> None:
        """So many are likely to be sampled together next."""
        with self._changed:
            self._ahead = clips
            self._changed.notify_all()

    def _has_room(self) -> bool:
        ahead = self._ahead if self._sampling else 2 * self._ahead
        max_in_flight = self._max_in_flight + 2 * (self._ahead - 1)
        return self._coming + len(self._ready) < ahead and self._in_flight < max_in_flight
