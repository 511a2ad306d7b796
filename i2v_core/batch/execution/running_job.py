"""A job in hand: what its stages have made so far, and whether it is to go on."""

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
    """Why a job in hand stops before its end, and where it is then; `LOST` is another's by now."""

    PAUSED = JobState.PAUSED
    CANCELLED = JobState.CANCELLED
    STOPPED = JobState.WAITING
    LOST = None


STOP_REASON_OF = {StopRequest.PAUSE: StopReason.PAUSED, StopRequest.CANCEL: StopReason.CANCELLED}


class StopJobError(Exception):
    """Raised within a stage to leave it."""


@dataclass(slots=True, kw_only=True, eq=False)
class RunningJob:
    """Handed from lane to lane; but for `ending` and `progress`, only one thread has it at a time.

    `state` is where sampling is that goes on alone. `stepped_at` says when its steps alone had ended, and `handed_over`
    when its last frame was decoded, by a monotonic clock.
    """

    record: JobRecord
    model: I2VModel
    plan: Plan
    output: Path
    latents_file: Path
    conditioning: Conditioning | None = None
    state: LoopState | None = None
    samples: Tensor | None = None
    reports: list[StageReport] = field(default_factory=list[StageReport])
    notes: list[str] = field(default_factory=list[str])
    progress: tuple[str, int, int] = ("", 0, 0)
    stepped_at: list[float] = field(default_factory=list[float])
    stop_reason: StopReason | None = None
    handed_over: float = 0.0
    finished: threading.Event = field(default_factory=threading.Event)

    @property
    def id(self) -> int:
        return self.record.id

    @property
    def spec(self) -> JobSpec:
        return self.record.spec

    def check(self) -> None:
        """Raises `StopJobError` once the job is to stop; called at least once a chunk."""
        if self.stop_reason is not None:
            raise StopJobError(self.stop_reason.name)

    @property
    def measured_bytes(self) -> int | None:
        return max((report.measured_peak_bytes for report in self.reports), default=None)
