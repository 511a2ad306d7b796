"""A device of an engine with all that belongs to it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..devices.admission import AdmissionController
from ..devices.device import BatchDevice, DeviceStatus
from ..execution.pipeline import StagePipeline
from ..execution.running_job import RunningJob


@dataclass(slots=True, eq=False)
class DeviceWorker:
    """`failed_in_a_row` are jobs since the last that went well; `took` is when the last was taken."""

    device: BatchDevice
    desk: AdmissionController
    lanes: StagePipeline
    flights: dict[int, RunningJob] = field(default_factory=dict[int, RunningJob])
    failed_in_a_row: set[int] = field(default_factory=set[int])
    took: float = field(default_factory=time.monotonic)
    lost: bool = False

    def status(self, too_large_now: int) -> DeviceStatus:
        """`too_large_now` jobs wait for other programs."""
        return DeviceStatus(
            name=self.device.name,
            room=self.device.room(),
            reserved_bytes=self.desk.reserved_bytes,
            jobs=tuple(self.flights),
            waits=self.desk.waits(),
            too_large_now=too_large_now,
        )
