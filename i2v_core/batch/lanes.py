"""One device's threads: encode, sample and decode, each with one job at a time, so that three jobs may overlap.

```
 queue ──► encode n+1 ──► sample n ──► decode n−1 ──► write n−2
```

Whether they do is the desk's to say: each stage waits until it fits beside the others.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Protocol

from PIL import Image

from ..errors import I2VError
from ..planning.plan import Stage
from .flight import Flight, StopJobError
from .stage_runs import StageRunner, Twins
from .writing import Writing

logger = logging.getLogger(__name__)


class Tower(Protocol):
    """Who gives lanes their jobs, and is told how they end."""

    def next_flight(self, device: str) -> Flight | None:
        """The device's next job; waits for one, None when there will be none."""
        ...

    def entered(self, flight: Flight, stage: Stage) -> None: ...

    def landed(self, flight: Flight, error: Exception | None) -> None:
        """The flight is over, well or not; called once for each."""
        ...

    def show(self, flight: Flight, thumbnail: Image.Image) -> None: ...


class Lanes:
    """The threads of one device. `in_hand` jobs at most are between the queue and their file, one of them encoded
    ahead; with 1, jobs run one after another.
    """

    def __init__(self, device: str, runner: StageRunner, tower: Tower, in_hand: int) -> None:
        self._device, self._runner, self._tower = device, runner, tower
        self._in_hand = threading.Semaphore(in_hand)
        self._ahead = threading.Semaphore(2)  # one that is sampled, one that waits for that
        self._encoded: queue.Queue[Flight | None] = queue.Queue()
        self._sampled: queue.Queue[Flight | None] = queue.Queue()
        lanes = {"encode": self._encode_lane, "sample": self._sample_lane, "decode": self._decode_lane}
        self._threads = [
            threading.Thread(target=lane, name=f"{name} on {device}", daemon=True) for name, lane in lanes.items()
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def land(self, flight: Flight, error: Exception | None) -> None:
        """A flight is over: there is room for another."""
        if error is None:
            self._runner.written(flight)
        self._tower.landed(flight, error)
        flight.landed.set()
        self._in_hand.release()

    def _encode_lane(self) -> None:
        twins = Twins()
        while True:
            self._ahead.acquire()
            self._in_hand.acquire()
            flight = self._tower.next_flight(self._device)
            if flight is None:
                self._encoded.put(None)
                return
            if self._flies(flight, Stage.ENCODE, lambda it: self._runner.encode(it, twins.of(it.model))):
                self._encoded.put(flight)
            else:
                self._ahead.release()

    def _sample_lane(self) -> None:
        twins = Twins()
        while (flight := self._encoded.get()) is not None:
            if self._flies(flight, Stage.SAMPLE, lambda it: self._runner.sample(it, twins.of(it.model))):
                self._sampled.put(flight)
            self._ahead.release()
        self._sampled.put(None)

    def _decode_lane(self) -> None:
        twins = Twins()
        while (flight := self._sampled.get()) is not None:
            writing = Writing(flight, _landing(self, flight), self._tower.show)
            self._flies(flight, Stage.DECODE, _decoding(self._runner, twins, writing), writing)

    def _flies(
        self, flight: Flight, stage: Stage, run: Callable[[Flight], None], writing: Writing | None = None
    ) -> bool:
        """Whether the stage went well; if not, the flight is over."""
        try:
            self._tower.entered(flight, stage)
            run(flight)
            return True
        except Exception as error:
            if not isinstance(error, (I2VError, StopJobError)):
                logger.exception("%s of job %d failed", stage.value, flight.id)
            # What the failed stage had made is in its frames, which the traceback holds.
            failure = error.with_traceback(None)
        if writing is not None:
            writing.abandon()
        self.land(flight, failure)
        return False


def _landing(lanes: Lanes, flight: Flight) -> Callable[[Exception | None], None]:
    return lambda error: lanes.land(flight, error)


def _decoding(runner: StageRunner, twins: Twins, writing: Writing) -> Callable[[Flight], None]:
    return lambda flight: runner.decode(flight, twins.of(flight.model), writing)
