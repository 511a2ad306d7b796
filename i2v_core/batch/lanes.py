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
from collections.abc import Callable, Sequence
from typing import Protocol

from PIL import Image

from ..errors import I2VError
from ..planning.plan import Plan, Stage
from .flight import Flight, StopJobError
from .group_runs import GroupRun
from .line import Line
from .stage_runs import StageRunner, Twins
from .together import Grouping, shape
from .writing import Writing

logger = logging.getLogger(__name__)


class Tower(Protocol):
    """Who gives lanes their jobs, and is told how they end."""

    def next_flight(self, device: str, *, at_once: bool = False) -> Flight | None:
        """The device's next job; waits for one, None when there will be none; or `at_once`, None when there is none."""
        ...

    def entered(self, flight: Flight, stage: Stage) -> None: ...

    def grouped(self, flights: Sequence[Flight], plan: Plan) -> None:
        """These are about to be sampled together, by this plan."""
        ...

    def landed(self, flight: Flight, error: Exception | None) -> None:
        """The flight is over, well or not; called once for each."""
        ...

    def show(self, flight: Flight, thumbnail: Image.Image) -> None: ...


class Lanes:
    """The threads of one device. `in_hand` jobs at most are between the queue and their file, one of them encoded
    ahead; with 1, jobs run one after another.
    """

    def __init__(self, device: str, runner: StageRunner, tower: Tower, in_hand: int, grouping: Grouping) -> None:
        self._device, self._runner, self._tower, self._grouping = device, runner, tower, grouping
        self._line = Line(in_hand)
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
        self._line.landed()

    def _encode_lane(self) -> None:
        twins = Twins()
        while True:
            self._line.wait_for_room()
            flight = self._tower.next_flight(self._device, at_once=True)
            if flight is None:
                self._line.set_idle(True)
                flight = self._tower.next_flight(self._device)
                self._line.set_idle(False)
            if flight is None:
                self._line.end()
                return
            encoded = self._flies(flight, Stage.ENCODE, lambda it: self._runner.encode(it, twins.of(it.model)))
            self._line.came(flight if encoded else None)

    def _sample_lane(self) -> None:
        twins = Twins()

        def alone(flight: Flight) -> None:
            kind = shape(flight)
            self._runner.sample(flight, twins.of(flight.model))
            self._grouping.sampled_alone(kind, flight.stepped_at)

        while (leader := self._line.lead()) is not None:
            for flight in self._together(leader, twins):
                if flight.samples is not None or self._flies(flight, Stage.SAMPLE, alone):
                    self._sampled.put(flight)
        self._sampled.put(None)

    def _together(self, leader: Flight, twins: Twins) -> list[Flight]:
        """The job that is next, sampled together with others that wait and are alike, where that is to be; those that
        are to be sampled alone, or to go on so, are not done yet.
        """
        if leader.samples is not None:
            return [leader]
        kind = shape(leader)

        def is_alike(flight: Flight) -> bool:
            return flight.samples is None and flight.model is leader.model and shape(flight) == kind

        most = self._grouping.expected(leader)
        self._line.expect(most)
        if self._grouping.plan(leader, most) is None:
            return [leader]
        plan = self._grouping.plan(leader, 1 + self._line.gather(is_alike, most - 1))
        if plan is None:
            return [leader]
        flights = [leader, *self._line.join(is_alike, plan.request.clips - 1)]
        flights = [it for it in flights if self._flies(it, Stage.SAMPLE, lambda _: None)]
        if len(flights) > 1:
            self._tower.grouped(flights, plan)
            group = GroupRun(
                runner=self._runner, grouping=self._grouping, flights=flights, kind=kind, plan=plan, left=self.land
            )
            group.sample(twins.of(leader.model))
        return [it for it in flights if not it.landed.is_set()]

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
