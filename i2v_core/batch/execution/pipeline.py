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

from ...errors import I2VError
from ...planning.plan import Plan, Stage
from .batched_sampling import BatchedSampling
from .batching import BatchingPolicy, batch_key
from .ready_queue import ReadyQueue
from .running_job import RunningJob, StopJobError
from .stage_runner import ModelReplicas, StageRunner
from .video_writer import AsyncVideoWriter

logger = logging.getLogger(__name__)


class JobSource(Protocol):
    """Who gives lanes their jobs, and is told how they end."""

    def next_job(self, device: str, *, at_once: bool = False) -> RunningJob | None:
        """The device's next job; waits for one, None when there will be none; or `at_once`, None when there is none."""
        ...

    def on_stage(self, flight: RunningJob, stage: Stage) -> None: ...

    def on_batched(self, flights: Sequence[RunningJob], plan: Plan) -> None:
        """These are about to be sampled together, by this plan."""
        ...

    def on_finished(self, flight: RunningJob, error: Exception | None) -> None:
        """The flight is over, well or not; called once for each."""
        ...

    def on_thumbnail(self, flight: RunningJob, thumbnail: Image.Image) -> None: ...


class StagePipeline:
    """The threads of one device. `max_in_flight` jobs at most are between the queue and their file, one of them encoded
    ahead; with 1, jobs run one after another.
    """

    def __init__(
        self, device: str, runner: StageRunner, tower: JobSource, max_in_flight: int, grouping: BatchingPolicy
    ) -> None:
        self._device, self._runner, self._tower, self._grouping = device, runner, tower, grouping
        self._line = ReadyQueue(max_in_flight)
        self._sampled: queue.Queue[RunningJob | None] = queue.Queue()
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

    def finish(self, flight: RunningJob, error: Exception | None) -> None:
        """A flight is over: there is room for another."""
        if error is None:
            self._runner.written(flight)
        self._tower.on_finished(flight, error)
        flight.finished.set()
        self._line.on_finished()

    def _encode_lane(self) -> None:
        twins = ModelReplicas()
        while True:
            self._line.wait_for_room()
            flight = self._tower.next_job(self._device, at_once=True)
            if flight is None:
                self._line.set_idle(True)
                flight = self._tower.next_job(self._device)
                self._line.set_idle(False)
            if flight is None:
                self._line.end()
                return
            encoded = self._flies(flight, Stage.ENCODE, lambda it: self._runner.encode(it, twins.of(it.model)))
            self._line.push(flight if encoded else None)

    def _sample_lane(self) -> None:
        twins = ModelReplicas()

        def alone(flight: RunningJob) -> None:
            kind = batch_key(flight)
            self._runner.sample(flight, twins.of(flight.model))
            self._grouping.sampled_alone(kind, flight.stepped_at)

        while (leader := self._line.pop()) is not None:
            for flight in self._together(leader, twins):
                if flight.samples is not None or self._flies(flight, Stage.SAMPLE, alone):
                    self._sampled.put(flight)
        self._sampled.put(None)

    def _together(self, leader: RunningJob, twins: ModelReplicas) -> list[RunningJob]:
        """The job that is next, sampled together with others that wait and are alike, where that is to be; those that
        are to be sampled alone, or to go on so, are not done yet.
        """
        if leader.samples is not None:
            return [leader]
        kind = batch_key(leader)

        def is_alike(flight: RunningJob) -> bool:
            return flight.samples is None and flight.model is leader.model and batch_key(flight) == kind

        most = self._grouping.expected(leader)
        self._line.set_batch_hint(most)
        if self._grouping.plan(leader, most) is None:
            return [leader]
        plan = self._grouping.plan(leader, 1 + self._line.wait_for_matching(is_alike, most - 1))
        if plan is None:
            return [leader]
        flights = [leader, *self._line.take_matching(is_alike, plan.request.clips - 1)]
        flights = [it for it in flights if self._flies(it, Stage.SAMPLE, lambda _: None)]
        if len(flights) > 1:
            self._tower.on_batched(flights, plan)
            group = BatchedSampling(
                runner=self._runner, grouping=self._grouping, flights=flights, kind=kind, plan=plan, left=self.finish
            )
            group.sample(twins.of(leader.model))
        return [it for it in flights if not it.finished.is_set()]

    def _decode_lane(self) -> None:
        twins = ModelReplicas()
        while (flight := self._sampled.get()) is not None:
            writing = AsyncVideoWriter(flight, _landing(self, flight), self._tower.on_thumbnail)
            self._flies(flight, Stage.DECODE, _decoding(self._runner, twins, writing), writing)

    def _flies(
        self,
        flight: RunningJob,
        stage: Stage,
        run: Callable[[RunningJob], None],
        writing: AsyncVideoWriter | None = None,
    ) -> bool:
        """Whether the stage went well; if not, the flight is over."""
        try:
            self._tower.on_stage(flight, stage)
            run(flight)
            return True
        except Exception as error:
            if not isinstance(error, (I2VError, StopJobError)):
                logger.exception("%s of job %d failed", stage.value, flight.id)
            # What the failed stage had made is in its frames, which the traceback holds.
            failure = error.with_traceback(None)
        if writing is not None:
            writing.abandon()
        self.finish(flight, failure)
        return False


def _landing(lanes: StagePipeline, flight: RunningJob) -> Callable[[Exception | None], None]:
    return lambda error: lanes.finish(flight, error)


def _decoding(runner: StageRunner, twins: ModelReplicas, writing: AsyncVideoWriter) -> Callable[[RunningJob], None]:
    return lambda flight: runner.decode(flight, twins.of(flight.model), writing)
