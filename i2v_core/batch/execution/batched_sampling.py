"""Sampling several jobs in the same denoiser calls, each with its own progress, checkpoint, end and result."""

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
    """One batch of jobs that share a `batch_key`. It is admitted to the device as one stage."""

    runner: StageRunner
    batching: BatchingPolicy
    jobs: Sequence[RunningJob]
    key: Hashable
    plan: Plan
    on_left: Callable[[RunningJob, Exception], None]
    """Called for each job that ends before the others."""

    def sample(self, model: I2VModel) -> None:
        """Sets the samples of the jobs that complete in the batch.

        The others continue alone, from the state that they have reached. An error is not raised here: if it is one
        job's fault, that shows when it runs alone.
        """
        try:
            result = self._run(model)
        except Exception as error:  # before the first step, or all were told to stop
            logger.info("%d jobs are not sampled together: %r", len(self.jobs), error)
            return
        for index, samples in result.samples.items():
            job = self.jobs[index]
            job.reports.append(result.report)
            job.notes.append(f"sampled together with {_others(len(self.jobs) - 1)}")
            self.runner.set_samples(job, samples)
        for index, state in result.states.items():
            self.jobs[index].state = state
            self.jobs[index].notes.append(f"went on alone from step {state.steps_done}: {result.problem}")
        if result.problem is not None:
            logger.info("%d jobs go on alone: %r", len(result.states), result.problem)
            if is_out_of_memory(result.problem):
                self.batching.record_out_of_memory(self.key, len(self.jobs))

    def _run(self, model: I2VModel) -> stages.BatchedResult:
        runner, first, plan = self.runner, self.jobs[0], self.plan
        asked = time.monotonic()
        needed = needed_bytes(plan.prediction(Stage.SAMPLE), plan.device)
        ticket = runner.admission.admit(first.id, Stage.SAMPLE, needed, self._check, runner.memory_wait_seconds)
        begun = time.monotonic()
        try:
            with runner.device.stage(Stage.SAMPLE, plan):
                result = stages.sample_batched(
                    model,
                    plan,
                    [self._request(job) for job in self.jobs],
                    runner.runtime(self._check),
                    runner.checkpointing,
                    is_worthwhile=lambda seconds: self.batching.pays(self.key, len(self.jobs), seconds),
                    on_left=lambda index, error: self.on_left(self.jobs[index], error),
                )
        finally:
            alone = runner.admission.leave(ticket)
            ended = time.monotonic()
            for job in self.jobs:
                runner.report_span(job, Stage.SAMPLE.value, asked=asked, begun=begun, ended=ended)
        if result.problem is None:
            runner.device.concluded(result.report, alone=alone)
        return result

    def _check(self) -> None:
        """Raises when all jobs are to stop. A single one leaves the batch after a step."""
        if all(job.stop_reason is not None for job in self.jobs):
            self.jobs[0].check()

    def _request(self, job: RunningJob) -> stages.SampleRequest:
        def on_progress(done: int, total: int, _: Any) -> None:
            job.progress = (Stage.SAMPLE.value, done, total)

        assert job.conditioning is not None
        job.progress = (Stage.SAMPLE.value, 0, 0)
        return stages.SampleRequest(
            conditioning=job.conditioning,
            settings=job.spec.sampler,
            check_cancelled=job.check,
            on_progress=on_progress,
        )


def _others(count: int) -> str:
    return f"{count} other{'s' if count > 1 else ''}"
