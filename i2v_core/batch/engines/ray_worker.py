"""One device of a Ray cluster: a local engine that is handed one job after another by the driver."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...errors import BadInputError
from ...families import Architecture
from ...memory.device import DeviceFacts, device_facts
from ...memory.device_memory import DeviceMemory
from ...placement.attention import AttentionBackend
from ...planning.request import Budget
from ..devices.device import LocalDevice, with_model_loaded
from ..jobs.job import JobSpec, JobState
from ..jobs.store import JobStore
from ..monitoring.events import Event, EventKind
from .local import LocalEngine
from .settings import EngineSettings

_ENDED = (EventKind.DONE, EventKind.FOUND, EventKind.FAILED, EventKind.GIVEN_BACK)
_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDescription:
    """Facts about a worker's device that the driver needs to plan for it."""

    host: str
    pid: int
    device_facts: DeviceFacts
    device_budget: Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteDevice:
    """A worker's device, as the driver plans for it. It runs nothing in the driver's process."""

    name: str
    description: WorkerDescription

    def budget(self, architecture: Architecture) -> Budget:
        return with_model_loaded(self.description.device_budget, architecture)

    def facts(self, architecture: Architecture) -> DeviceFacts:  # noqa: ARG002
        return self.description.device_facts

    def room(self) -> DeviceMemory:
        return self.description.device_budget


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """Result of a job on a worker."""

    state: JobState
    problem: str | None
    report: dict[str, Any] | None
    """Reports of the stages, or of the failure."""
    measured_bytes: int | None
    worker_lost: bool
    """The worker can run nothing more in this process."""


class BatchWorker:
    """The actor that the driver starts for each device. Ray calls its methods from several threads at once.

    Its own queue is in a temporary folder. Videos, checkpoints and kept latents are where `settings` say, which every
    worker must be able to reach.
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
        self._changed = threading.Condition()
        self._ended: set[int] = set()
        # The driver alone decides about retries and when there are no more jobs.
        settings = replace(settings, waits_for_more=True, attempts=1, retry_seconds=0.0)
        self._engine = LocalEngine(self._store, [self._device], settings, on_event=self._on_event)
        self._engine.start()

    def describe(self) -> WorkerDescription:
        return WorkerDescription(
            host=socket.gethostname(),
            pid=os.getpid(),
            device_facts=device_facts(self._device.torch_device),
            device_budget=self._device.empty_budget(),
        )

    def run(self, spec: dict[str, Any]) -> JobResult:
        """Runs a job until it has ended here. One that had not begun when the device is lost stays waiting."""
        (job_id,) = self._store.add([JobSpec.from_dict(spec)])
        with self._changed:
            self._ended.discard(job_id)
        job = self._store.job(job_id)
        is_done = job.state is JobState.DONE and job.output is not None and job.output.exists()
        if job.state is JobState.PAUSED:
            self._store.resume(job_id)
        elif job.state.is_final and not is_done:
            self._store.retry(job_id)
        if not is_done:
            self._engine.wake()
            self._wait_for_end(job_id)
            job = self._store.job(job_id)
        return JobResult(
            state=job.state,
            problem=job.problem,
            report=job.report,
            measured_bytes=job.measured_bytes,
            worker_lost=self._engine.is_over or not self._engine.status(),
        )

    def stop(self, key: str) -> None:
        """Stops a job that runs here or is about to. Its checkpoint is kept; the driver decides what becomes of it."""
        for job in self._store.jobs(JobState.WAITING, JobState.RUNNING):
            if job.spec.key == key:
                with suppress(BadInputError):  # it has ended in the meantime
                    self._engine.pause_job(job.id)
                if self._store.job(job.id).state is JobState.PAUSED:
                    self._note_end(job.id)

    def progress(self) -> dict[str, tuple[str, int, int]]:
        """Stage, and how many of how many steps or frames of it are done, of each running job by its key."""
        jobs = self._store.jobs(JobState.RUNNING)
        return {job.spec.key: (job.stage or "", job.done, job.total) for job in jobs}

    def _wait_for_end(self, job_id: int) -> None:
        with self._changed:
            while job_id not in self._ended and not self._engine.is_over:
                self._changed.wait(_POLL_SECONDS)

    def _on_event(self, event: Event) -> None:
        if event.kind in _ENDED and event.job is not None:
            self._note_end(event.job)

    def _note_end(self, job_id: int) -> None:
        with self._changed:
            self._ended.add(job_id)
            self._changed.notify_all()
