"""One device's threads: encode, sample and decode, each with one job at a time, so that three jobs may overlap.

```
 queue ──► encode n+1 ──► sample n ──► decode n−1 ──► write n−2
```

Admission decides whether they do overlap: each stage waits until it fits beside the others.
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
from .model_cache import ModelReplicas
from .ready_queue import ReadyQueue
from .running_job import RunningJob, StopJobError
from .stage_runner import StageRunner
from .video_writer import AsyncVideoWriter

logger = logging.getLogger(__name__)


class JobSource(Protocol):
    """Supplies jobs to the pipeline and receives completion callbacks."""

    def next_job(self, device: str, *, at_once: bool = False) -> RunningJob | None:
        """The device's next job. Waits for one, and returns None when there will be none; with `at_once` it returns
        None when there is none now.
        """
        ...

    def on_stage(self, job: RunningJob, stage: Stage) -> None: ...

    def on_batched(self, jobs: Sequence[RunningJob], plan: Plan) -> None:
        """Called before these are sampled together, by this plan."""
        ...

    def on_finished(self, job: RunningJob, error: Exception | None) -> None:
        """Called once for each job, when its video is written or with the error that ended it."""
        ...

    def on_thumbnail(self, job: RunningJob, thumbnail: Image.Image) -> None: ...


class StagePipeline:
    """The threads of one device.

    At most `max_in_flight` jobs are between the queue and their file, one of them encoded ahead; with 1, jobs run one
    after another.
    """

    def __init__(
        self, device: str, runner: StageRunner, source: JobSource, max_in_flight: int, batching: BatchingPolicy
    ) -> None:
        self._device, self._runner, self._source, self._batching = device, runner, source, batching
        self._ready = ReadyQueue(max_in_flight)
        self._sampled: queue.Queue[RunningJob | None] = queue.Queue()
        loops = {"encode": self._encode_jobs, "sample": self._sample_jobs, "decode": self._decode_jobs}
        self._threads = [
            threading.Thread(target=loop, name=f"{name} on {device}", daemon=True) for name, loop in loops.items()
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def finish(self, job: RunningJob, error: Exception | None) -> None:
        """Ends a job, and makes room for another."""
        if error is None:
            self._runner.on_written(job)
        self._source.on_finished(job, error)
        job.finished.set()
        self._ready.on_finished()

    def _encode_jobs(self) -> None:
        replicas = ModelReplicas()
        while True:
            self._ready.wait_for_room()
            job = self._source.next_job(self._device, at_once=True)
            if job is None:
                self._ready.set_idle(True)
                job = self._source.next_job(self._device)
                self._ready.set_idle(False)
            if job is None:
                self._ready.end()
                return
            encoded = self._run_stage(job, Stage.ENCODE, lambda it: self._runner.encode(it, replicas.of(it.model)))
            self._ready.push(job if encoded else None)

    def _sample_jobs(self) -> None:
        replicas = ModelReplicas()

        def sample_alone(job: RunningJob) -> None:
            key = batch_key(job)
            self._runner.sample(job, replicas.of(job.model))
            self._batching.record_single(key, job.stepped_at)

        while (first := self._ready.pop()) is not None:
            for job in self._sample_batch(first, replicas):
                if job.samples is not None or self._run_stage(job, Stage.SAMPLE, sample_alone):
                    self._sampled.put(job)
        self._sampled.put(None)

    def _sample_batch(self, first: RunningJob, replicas: ModelReplicas) -> list[RunningJob]:
        """Samples the next job together with matching ones that are ready, if a batch is to be made.

        Returns the jobs that go on. Those without samples are to be sampled alone.
        """
        if first.samples is not None:
            return [first]
        key = batch_key(first)

        def matches(job: RunningJob) -> bool:
            return job.samples is None and job.model is first.model and batch_key(job) == key

        expected = self._batching.expected_clips(first)
        self._ready.set_batch_hint(expected)
        if self._batching.plan(first, expected) is None:
            return [first]
        plan = self._batching.plan(first, 1 + self._ready.wait_for_matching(matches, expected - 1))
        if plan is None:
            return [first]
        jobs = [first, *self._ready.take_matching(matches, plan.request.clips - 1)]
        jobs = [job for job in jobs if self._run_stage(job, Stage.SAMPLE, lambda _: None)]
        if len(jobs) > 1:
            self._source.on_batched(jobs, plan)
            BatchedSampling(
                runner=self._runner, batching=self._batching, jobs=jobs, key=key, plan=plan, on_left=self.finish
            ).sample(replicas.of(first.model))
        return [job for job in jobs if not job.finished.is_set()]

    def _decode_jobs(self) -> None:
        replicas = ModelReplicas()
        while (job := self._sampled.get()) is not None:
            writer = AsyncVideoWriter(job, _finishing(self, job), self._source.on_thumbnail)
            self._run_stage(job, Stage.DECODE, _decoding(self._runner, replicas, writer), writer)

    def _run_stage(
        self,
        job: RunningJob,
        stage: Stage,
        run: Callable[[RunningJob], None],
        writer: AsyncVideoWriter | None = None,
    ) -> bool:
        """Whether the stage went well; if not, the job has been ended with the error."""
        try:
            self._source.on_stage(job, stage)
            run(job)
            return True
        except Exception as error:
            if not isinstance(error, (I2VError, StopJobError)):
                logger.exception("%s of job %d failed", stage.value, job.id)
            # The traceback holds the stage's frames, and with them its tensors.
            failure = error.with_traceback(None)
        if writer is not None:
            writer.abandon()
        self.finish(job, failure)
        return False


# Functions, not lambdas in the loop: a lambda would see the loop's next job.
def _finishing(pipeline: StagePipeline, job: RunningJob) -> Callable[[Exception | None], None]:
    return lambda error: pipeline.finish(job, error)


def _decoding(runner: StageRunner, replicas: ModelReplicas, writer: AsyncVideoWriter) -> Callable[[RunningJob], None]:
    return lambda job: runner.decode(job, replicas.of(job.model), writer)
