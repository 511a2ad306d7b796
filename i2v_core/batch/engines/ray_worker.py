"""One device of a Ray cluster: an engine of its own, which is handed one job after another."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...families import Architecture
from ...memory.device import DeviceFacts, device_facts
from ...memory.device_memory import DeviceMemory
from ...placement.attention import AttentionBackend
from ...planning.request import Budget
from ..devices.device import LocalDevice, with_model_loaded
from ..jobs.job import JobSpec, JobState, StopRequest
from ..jobs.store import JobStore
from ..monitoring.events import Event, EventKind
from .local import Engine
from .settings import EngineSettings

_OVER = (EventKind.DONE, EventKind.FOUND, EventKind.FAILED, EventKind.GIVEN_BACK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What the driver must know of a worker's device to plan for it."""

    host: str
    pid: int
    device_facts: DeviceFacts
    device_budget: Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteDevice:
    """A worker's device, as the driver plans for it. It runs nothing here."""

    name: str
    description: Description

    def budget(self, architecture: Architecture) -> Budget:
        return with_model_loaded(self.description.device_budget, architecture)

    def facts(self, architecture: Architecture) -> DeviceFacts:  # noqa: ARG002
        return self.description.device_facts

    def room(self) -> DeviceMemory:
        return self.description.device_budget


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """How a job has ended on a worker. `report` is of the stages, or of the failure."""

    state: JobState
    problem: str | None
    report: dict[str, Any] | None
    measured_bytes: int | None

    @property
    def is_permanent(self) -> bool:
        return bool(self.report and self.report.get("permanent"))


class BatchWorker:
    """Made an actor by `ray_engine`. Its methods are called from several threads at once.

    The queue that it keeps for itself is in its own temporary folder; videos, checkpoints and kept latents are where
    `settings` say, which every worker must be able to reach.
    """

    def __init__(self, settings: EngineSettings, limit_bytes: int | None, reserve_bytes: int) -> None:
        self._device = LocalDevice(
            torch_device=torch.device("cuda:0" if torch.cuda.is_available() else "cpu"),
            limit_bytes=limit_bytes,
            reserve_bytes=reserve_bytes,
            attention=AttentionBackend.SDPA,
        )
        self._folder = tempfile.TemporaryDirectory(prefix="i2v_worker_")
        self._store = JobStore(Path(self._folder.name) / "jobs.queue")
        self._over = threading.Condition()
        self._ended: set[int] = set()
        settings = replace(settings, waits_for_more=True, attempts=1)
        self._engine = Engine(self._store, [self._device], settings, on_event=self._hear)
        self._engine.start()

    def describe(self) -> Description:
        return Description(
            host=socket.gethostname(),
            pid=os.getpid(),
            device_facts=device_facts(self._device.torch_device),
            device_budget=self._device.empty_budget(),
        )

    def run(self, spec: dict[str, Any]) -> JobResult:
        """Returns when the job has ended here, in whatever way."""
        (job_id,) = self._store.add([JobSpec.from_dict(spec)])
        with self._over:
            self._ended.discard(job_id)
        state = self._store.job(job_id).state
        if state in (JobState.FAILED, JobState.CANCELLED):
            self._store.retry(job_id)
        elif state is JobState.PAUSED:
            self._store.resume(job_id)
        self._engine.wake()
        if state is not JobState.DONE:
            with self._over:
                self._over.wait_for(lambda: job_id in self._ended)
        job = self._store.job(job_id)
        return JobResult(state=job.state, problem=job.problem, report=job.report, measured_bytes=job.measured_bytes)

    def end(self, key: str, wish: StopRequest) -> None:
        """Stops a job that runs here, or is about to."""
        for job in self._store.jobs(JobState.WAITING, JobState.RUNNING):
            if job.spec.key == key:
                (self._engine.cancel if wish is StopRequest.CANCEL else self._engine.pause_job)(job.id)
                if self._store.job(job.id).state is not JobState.RUNNING:
                    self._note_end(job.id)

    def progress(self) -> dict[str, tuple[str, int, int]]:
        """By key, the stage and how far it is, of every job that runs here."""
        jobs = self._store.jobs(JobState.RUNNING)
        return {job.spec.key: (job.stage or "", job.done, job.total) for job in jobs}

    def _hear(self, event: Event) -> None:
        if event.kind in _OVER and event.job is not None:
            self._note_end(event.job)

    def _note_end(self, job_id: int) -> None:
        with self._over:
            self._ended.add(job_id)
            self._over.notify_all()
