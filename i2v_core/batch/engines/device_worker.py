"""One device of the local engine: its admission, its stage pipeline, and whether it can still be used."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...sampling.checkpoint import Checkpointing
from ..devices.admission import AdmissionController
from ..devices.device import BatchDevice, DeviceStatus
from ..execution.batching import BatchingPolicy
from ..execution.pipeline import JobSource, StagePipeline
from ..execution.stage_runner import StageRunner
from ..monitoring.events import Span
from .settings import EngineSettings

_FAILURES_OF_A_FAILING_DEVICE = 3
"""Different jobs, none of them known to be at fault."""


@dataclass(slots=True, eq=False)
class DeviceWorker:
    """Runs jobs on one device; made by `device_worker`."""

    device: BatchDevice
    admission: AdmissionController
    pipeline: StagePipeline
    memory_wait_seconds: float
    lost: bool = False
    _failed_jobs: set[int] = field(default_factory=set[int])
    """Jobs that have failed since the last that went well."""
    _last_taken: float = field(default_factory=time.monotonic)

    @property
    def is_starved(self) -> bool:
        """Whether other programs have kept jobs from it for too long, so that it is to take one that does not fit."""
        waited_seconds = time.monotonic() - self._last_taken
        return waited_seconds > self.memory_wait_seconds and self.admission.is_idle

    def on_taken(self) -> None:
        """Restarts the time after which the device counts as starved."""
        self._last_taken = time.monotonic()

    def on_done(self) -> None:
        self._failed_jobs.clear()

    def on_failed(self, job_id: int) -> bool:
        """Counts a failure that is not known to be the job's fault; whether it is to be taken for the device's."""
        self._failed_jobs.add(job_id)
        return len(self._failed_jobs) >= _FAILURES_OF_A_FAILING_DEVICE

    def status(self, jobs: Sequence[int], too_large_now: int) -> DeviceStatus:
        """The device's status, for a page or a progress bar.

        Args:
            jobs: ids of those that it runs.
            too_large_now: number of jobs that wait for other programs to free memory.
        """
        return DeviceStatus(
            name=self.device.name,
            room=self.device.room(),
            reserved_bytes=self.admission.reserved_bytes,
            jobs=tuple(jobs),
            waits=self.admission.waits(),
            too_large_now=too_large_now,
        )


def device_worker(
    device: BatchDevice,
    source: JobSource,
    settings: EngineSettings,
    checkpointing: Checkpointing,
    on_span: Callable[[Span], None],
) -> DeviceWorker:
    """A worker that takes its jobs from `source` once its pipeline is started."""
    admission = AdmissionController(device.room)
    runner = StageRunner(
        device=device,
        admission=admission,
        checkpointing=checkpointing,
        memory_wait_seconds=settings.memory_wait_seconds,
        on_span=on_span,
    )
    max_clips = 1 if settings.max_in_flight == 1 else settings.clips_at_once
    batching = BatchingPolicy(device.room, max_clips)
    pipeline = StagePipeline(device.name, runner, source, settings.max_in_flight, batching)
    return DeviceWorker(device, admission, pipeline, settings.memory_wait_seconds)
