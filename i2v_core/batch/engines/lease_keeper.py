"""What keeps an engine's jobs its own: leases renewed, wishes handed on, and the jobs of the dead taken over."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from ...errors import FileError
from ..execution.running_job import STOP_REASON_OF, RunningJob, StopReason
from ..jobs.job import StopRequest
from ..jobs.leases import LeaseManager

logger = logging.getLogger(__name__)

_LOOK_FOR_DEAD_EVERY = 5
"""Beats."""


class LeaseKeeper:
    """Beats every so many seconds. `flights` gives the jobs in hand; `wake` is called when there are more to take."""

    def __init__(
        self, claims: LeaseManager, flights: Callable[[], list[RunningJob]], wake: Callable[[], None], seconds: float
    ) -> None:
        self._claims, self._flights, self._wake, self._seconds = claims, flights, wake, seconds
        self._stopped = threading.Event()

    def run(self) -> None:
        """Until it is stopped."""
        beats = 0
        while not self._stopped.wait(self._seconds):
            beats += 1
            try:
                self.renew()
                if beats % _LOOK_FOR_DEAD_EVERY == 0 and self._claims.reclaim_expired():
                    self._wake()
            except FileError as error:  # the next beat may do; a lease outlasts many
                logger.warning("%s", error)

    def stop(self) -> None:
        self._stopped.set()

    def renew(self) -> None:
        flights = {flight.id: flight for flight in self._flights()}
        wishes = self._claims.renew({job: it.progress for job, it in flights.items() if it.progress[0]})
        self.apply_stop_requests(wishes)
        held = {flight.id for flight in self._flights()}
        for job, flight in flights.items():
            # One that has landed in the meantime is nobody's any more.
            if job not in wishes and job in held:
                flight.stop_reason = StopReason.LOST

    def apply_stop_requests(self, wishes: Mapping[int, StopRequest | None]) -> None:
        """Jobs in hand stop within a chunk, where that is wished."""
        for flight in self._flights():
            wish = wishes.get(flight.id)
            if wish is not None and flight.stop_reason is None:
                flight.stop_reason = STOP_REASON_OF[wish]
