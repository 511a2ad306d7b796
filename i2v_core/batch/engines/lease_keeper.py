"""Renewing leases: an engine's jobs stay its own, stop on request, and stop when their lease is lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager

from ...errors import FileError
from ..execution.running_job import STOP_REASON_OF, HeldJob, StopReason
from ..jobs.job import StopRequest
from ..jobs.leases import LeaseManager

logger = logging.getLogger(__name__)

_RENEWALS_PER_RECLAIM = 5


class LeaseKeeper:
    """Renews an engine's leases in a thread of its own, and reclaims those of processes that have ended.

    Args:
        jobs: the jobs that the engine holds now.
        wake: called when jobs were reclaimed, which may be taken up.
        seconds: between renewals.
        refresh: called before each renewal, to bring the jobs' progress up to date.
    """

    def __init__(
        self,
        leases: LeaseManager,
        jobs: Callable[[], Sequence[HeldJob]],
        wake: Callable[[], None],
        seconds: float,
        refresh: Callable[[], None] = lambda: None,
    ) -> None:
        self._leases, self._jobs, self._wake, self._seconds, self._refresh = leases, jobs, wake, seconds, refresh
        self._stopped = threading.Event()

    @contextmanager
    def running(self) -> Generator[None]:
        """Renews leases while the context lasts."""
        thread = threading.Thread(target=self._run, name="lease keeper", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join()

    def renew(self) -> None:
        """Renews all leases, and tells jobs to stop whose lease is lost or for which a stop was requested."""
        self._refresh()
        jobs = self._jobs()
        renewed = self._leases.renew({job.id: job.progress for job in jobs if job.progress[0]})
        for job in jobs:
            if job.concluded:
                continue
            if job.id not in renewed:
                job.stop(StopReason.LOST)
            elif (request := renewed[job.id]) is not None:
                job.stop(STOP_REASON_OF[request])
            elif job.stop_reason is not None:
                # Repeated, since a request may reach a remote worker before the job itself does.
                job.stop(job.stop_reason)

    def apply_stop_requests(self, requests: Mapping[int, StopRequest]) -> None:
        """Tells jobs to stop at once, without waiting for the next renewal to find the request in the queue."""
        for job in self._jobs():
            if job.id in requests:
                job.stop(STOP_REASON_OF[requests[job.id]])

    def _run(self) -> None:
        renewals = 0
        while not self._stopped.wait(self._seconds):
            renewals += 1
            try:
                self.renew()
                if renewals % _RENEWALS_PER_RECLAIM == 0 and self._leases.reclaim_expired():
                    self._wake()
            except FileError as error:
                # The next renewal may succeed; a lease outlasts many of them.
                logger.warning("the leases were not renewed: %s", error)
