"""Jobs whose lease an engine holds: what they are, how far they are, and why they are to stop."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from torch import Tensor

from ...families import Conditioning, I2VModel
from ...planning.plan import Plan
from ...sampling.state import LoopState
from ...stages import StageReport
from ..jobs.job import JobRecord, JobSpec, JobState, StopRequest


class StopReason(Enum):
    """Why a job stops before its end. The value is the state in which it goes back to the queue."""

    PAUSED = JobState.PAUSED
    CANCELLED = JobState.CANCELLED
    STOPPED = JobState.WAITING
    LOST = None
    """The lease ran out, and another process may run the job by now."""


STOP_REASON_OF = {StopRequest.PAUSE: StopReason.PAUSED, StopRequest.CANCEL: StopReason.CANCELLED}


class StopJobError(Exception):
    """Raised within a stage to leave it."""


@dataclass(slots=True, kw_only=True, eq=False)
class HeldJob:
    """A job that an engine holds, wherever it runs. Engines add what they need to run it."""

    record: JobRecord
    output: Path
    progress: tuple[str, int, int] = ("", 0, 0)
    """Stage, and how many of how many steps or frames of it are done."""
    stop_reason: StopReason | None = None
    concluded: bool = False
    """The queue is being told, or has been told, how this run ended: its lease is nobody's concern here any more."""

    @property
    def id(self) -> int:
        return self.record.id

    @property
    def spec(self) -> JobSpec:
        return self.record.spec

    @property
    def device(self) -> str:
        return self.record.device or ""

    def stop(self, reason: StopReason) -> None:
        """Makes the job stop within a chunk. The first reason counts, unless the lease is lost: that overrides all."""
        if self.stop_reason is None or reason is StopReason.LOST:
            self.stop_reason = reason


@dataclass(slots=True, kw_only=True, eq=False)
class RunningJob(HeldJob):
    """A job in the stage pipeline of a device of this process.

    Only one thread works on it at a time. `stop_reason` and `progress` are the exception: any thread may touch them.
    """

    model: I2VModel
    plan: Plan
    latents_file: Path
    """Keeps the samples until the video is written, so that a retry only decodes."""
    conditioning: Conditioning | None = None
    state: LoopState | None = None
    """State from which a job that left a batch continues to sample."""
    samples: Tensor | None = None
    reports: list[StageReport] = field(default_factory=list[StageReport])
    notes: list[str] = field(default_factory=list[str])
    stepped_at: list[float] = field(default_factory=list[float])
    """Times at which steps outside a batch ended, by a monotonic clock."""
    decoded_at: float = 0.0
    """Time at which the last frame was decoded, by a monotonic clock."""
    finished: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raises `StopJobError` once the job is to stop; called at least once a chunk."""
        if self.stop_reason is not None:
            raise StopJobError(self.stop_reason.name)

    @property
    def measured_bytes(self) -> int | None:
        return max((report.measured_peak_bytes for report in self.reports), default=None)
