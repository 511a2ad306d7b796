"""Jobs in hand that are sampled together: admitted as one, each with its own progress, checkpoint, end and result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from ... import stages
from ...families import I2VModel
from ...memory.device import is_out_of_memory
from ...planning.margin import needed_bytes
from ...planning.plan import Plan, Stage
from .batching import BatchingPolicy
from .running_job import RunningJob
from .stage_runner import StageRunner

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchedSampling:
    """Several flights of one shape, `kind`. `left` is told of each that ends before the others."""

    runner: StageRunner
    grouping: BatchingPolicy
    flights: Sequence[RunningJob]
    kind: Hashable
    plan: Plan
    left: Callable[[RunningJob, Exception], None]

    def sample(self, model: I2VModel) -> None:
        """Sets the samples of those that get done together; others are to go on alone, from the state that they have
        then. Whatever fails here will show whose fault it is there.
        """
        try:
            found = self._sampled(model)
        except Exception as error:  # before the first step, or as all were told to stop
            logger.info("%d jobs are not sampled together: %r", len(self.flights), error)
            return
        for index, samples in found.samples.items():
            flight = self.flights[index]
            flight.reports.append(found.report)
            flight.notes.append(f"sampled together with {_others(len(self.flights) - 1)}")
            self.runner.keep(flight, samples)
        for index, state in found.states.items():
            self.flights[index].state = state
            self.flights[index].notes.append(f"went on alone from step {state.steps_done}: {found.problem}")
        if found.problem is not None:
            logger.info("%d jobs go on alone: %r", len(found.states), found.problem)
            if is_out_of_memory(found.problem):
                self.grouping.does_not_fit(self.kind, len(self.flights))

    def _sampled(self, model: I2VModel) -> stages.BatchedResult:
        runner, leader, plan = self.runner, self.flights[0], self.plan
        asked = time.monotonic()
        needed = needed_bytes(plan.prediction(Stage.SAMPLE), plan.device)
        admission = runner.desk.admit(leader.id, Stage.SAMPLE, needed, self._check, runner.memory_wait_seconds)
        begun = time.monotonic()
        try:
            with runner.device.stage(Stage.SAMPLE, plan):
                found = stages.sample_batched(
                    model,
                    plan,
                    [self._clip(flight) for flight in self.flights],
                    runner.runtime(self._check),
                    runner.checkpointing,
                    is_worthwhile=lambda seconds: self.grouping.pays(self.kind, len(self.flights), seconds),
                    on_left=lambda index, error: self.left(self.flights[index], error),
                )
        finally:
            alone = runner.desk.leave(admission)
            ended = time.monotonic()
            for flight in self.flights:
                runner.span(flight, Stage.SAMPLE.value, asked=asked, begun=begun, ended=ended)
        if found.problem is None:
            runner.device.concluded(found.report, alone=alone)
        return found

    def _check(self) -> None:
        """Raises when all are to stop: one by itself leaves after a step."""
        if all(flight.stop_reason is not None for flight in self.flights):
            self.flights[0].check()

    def _clip(self, flight: RunningJob) -> stages.SampleRequest:
        def progressed(done: int, total: int, _: Any) -> None:
            flight.progress = (Stage.SAMPLE.value, done, total)

        assert flight.conditioning is not None
        flight.progress = (Stage.SAMPLE.value, 0, 0)
        return stages.SampleRequest(
            conditioning=flight.conditioning,
            settings=flight.spec.sampler,
            check_cancelled=flight.check,
            on_progress=progressed,
        )


def _others(count: int) -> str:
    return f"{count} other{'s' if count > 1 else ''}"
