"""What keeps an engine's jobs its own: leases renewed, wishes handed on, and the jobs of the dead taken over."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from ..errors import FileError
from .claims import Claims
from .flight import ENDING_OF, Ending, Flight
from .records import Wish

logger = logging.getLogger(__name__)

_LOOK_FOR_DEAD_EVERY = 5
"""Beats."""


class Heart:
    """Beats every so many seconds. `flights` gives the jobs in hand; `wake` is called when there are more to take."""

    def __init__(
        self, claims: Claims, flights: Callable[[], list[Flight]], wake: Callable[[], None], seconds: float
    ) -> None:
        self._claims, self._flights, self._wake, self._seconds = claims, flights, wake, seconds
        self._stopped = threading.Event()

    def beat(self) -> None:
        """Until it is stopped."""
        beats = 0
        while not self._stopped.wait(self._seconds):
            beats += 1
            try:
                self.renew()
                if beats % _LOOK_FOR_DEAD_EVERY == 0 and self._claims.take_over_from_dead():
                    self._wake()
            except FileError as error:  # the next beat may do; a lease outlasts many
                logger.warning("%s", error)

    def stop(self) -> None:
        self._stopped.set()

    def renew(self) -> None:
        flights = {flight.id: flight for flight in self._flights()}
        wishes = self._claims.renew({job: it.progress for job, it in flights.items() if it.progress[0]})
        self.grant(wishes)
        in_hand = {flight.id for flight in self._flights()}
        for job, flight in flights.items():
            # One that has landed in the meantime is nobody's any more.
            if job not in wishes and job in in_hand:
                flight.ending = Ending.LOST

    def grant(self, wishes: Mapping[int, Wish | None]) -> None:
        """Jobs in hand stop within a chunk, where that is wished."""
        for flight in self._flights():
            wish = wishes.get(flight.id)
            if wish is not None and flight.ending is None:
                flight.ending = ENDING_OF[wish]
