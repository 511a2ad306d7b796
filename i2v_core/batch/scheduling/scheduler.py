"""Chooses the next job of a device: reads the store, estimates new jobs for each device, and distributes them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import I2VError
from ...families import Architecture, read_architecture
from ..devices.admission import AdmissionController
from ..devices.device import PlannedDevice
from ..jobs.job import JobRecord
from ..jobs.leases import LeaseManager
from ..jobs.records import WaitingJob
from .device_queues import DeviceQueues
from .estimator import Estimate, Estimator, plan_key
from .policy import PendingJob, Policy, ScoreBreakdown, explain

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """A job leased to this engine."""

    record: JobRecord
    estimate: Estimate
    """Its plan and predicted seconds on the device."""
    explanation: ScoreBreakdown
    """Why it was its turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedJob:
    """A job that no device can run."""

    job: int
    error: I2VError


class Scheduler:
    """Keeps the devices' queues in step with the store. Every method may be called from any thread.

    Args:
        leases: of the engine, and of the store that jobs come from.
        admissions: the admission controller of each device.
        architecture: reads the architecture in a model folder.
    """

    def __init__(
        self,
        leases: LeaseManager,
        devices: Mapping[str, PlannedDevice],
        admissions: Mapping[str, AdmissionController],
        policy: Policy,
        architecture: Callable[[Path], Architecture] = read_architecture,
    ) -> None:
        self._leases, self._store = leases, leases.store
        self._admissions, self._policy = admissions, policy
        self._lock = threading.RLock()
        self._estimators = {
            name: Estimator(self._store, device.facts, device.budget) for name, device in devices.items()
        }
        # Each device is its own kind, since it has its own budget.
        self._queues = DeviceQueues({name: name for name in devices}, policy)
        self._known: dict[int, WaitingJob] = {}
        self._pending: dict[int, PendingJob] = {}
        # What ran last before this engine counts too: the page, which sees the store alone, shows the same order.
        self._loaded_plans = {name: self._last_plan(name) for name in devices}
        self._not_before: dict[int, float] = {}
        self._failed_on: dict[int, set[str]] = {}
        self._read_architecture = architecture
        self._architectures: dict[Path, Architecture] = {}
        self._learned = 0

    def next(self, device: str, *, even_if_full: bool = False) -> Assignment | RejectedJob | None:
        """Lease the device's next job; None where there is none for it now.

        Args:
            even_if_full: also take a job that does not fit beside other programs; it is planned again.
        """
        with self._lock:
            if device not in self._estimators or self._store.paused:
                return None
            rejected = self._sync()
            if rejected is not None:
                return rejected
            admission, now = self._admissions[device], self._store.clock()

            def fits(job: PendingJob) -> bool:
                return even_if_full or admission.fits_now(job.on[device].peak_bytes)

            while True:
                loaded_plan = self._loaded_plans[device]
                job = self._queues.take(device, now, loaded_plan, fits)
                if job is None:
                    self._queues.mark_idle(device, now)
                    return None
                record = self._leases.claim(job.id, device)
                self._forget(job.id)
                if record is None:  # another process was faster
                    continue
                self._loaded_plans[device] = job.plan
                architecture = self._architecture(record.spec.model)
                return Assignment(
                    record=record,
                    estimate=self._estimators[device].estimate(record.spec, architecture),
                    explanation=explain(self._policy, job, device, now, loaded_plan),
                )

    def explain(self, job_id: int, device: str) -> ScoreBreakdown | None:
        """Break down the score of a waiting job on a device; None if it does not wait, or does not fit there."""
        with self._lock:
            job = self._pending.get(job_id)
            if job is None or device not in job.on:
                return None
            return explain(self._policy, job, device, self._store.clock(), self._loaded_plans[device])

    def too_large_now(self, device: str) -> int:
        """Number of waiting jobs that fit the device, but not beside other programs."""
        with self._lock:
            peaks = [job.on[device].peak_bytes for job in self._pending.values() if device in job.on]
        return sum(not self._admissions[device].fits_now(peak_bytes) for peak_bytes in peaks)

    def estimator(self, device: str) -> Estimator:
        return self._estimators[device]

    def has_failed(self, job_id: int, device: str, seconds: float) -> None:
        """Retry the job on another device if there is one, and not before so many seconds: the cause may pass."""
        with self._lock:
            self._not_before[job_id] = time.monotonic() + seconds
            self._failed_on.setdefault(job_id, set()).add(device)

    def has_learned(self) -> None:
        """Note that timings were learned. Jobs are estimated again after 1, 2, 4, 8… times, as ever less changes."""
        with self._lock:
            self._learned += 1
            if self._learned & (self._learned - 1) == 0:
                self._known.clear()

    def lose(self, device: str) -> None:
        """Remove a device; jobs that no other can run are rejected at the next call."""
        with self._lock:
            del self._estimators[device]
            self._queues.lose(device, self._store.clock())
            self._known.clear()

    def _sync(self) -> RejectedJob | None:
        """Bring the queues in step with the store; return the first job, if any, that can run nowhere."""
        waiting = {job.id: job for job in self._store.waiting() if self._may_run(job.id)}
        for job_id in [it for it in self._pending if it not in waiting]:
            self._forget(job_id)
        new: list[PendingJob] = []
        predicted: list[tuple[int, float, int]] = []
        rejected: RejectedJob | None = None
        for job_id, job in waiting.items():
            if self._known.get(job_id) == job:
                continue
            self._forget(job_id)
            record = self._store.job(job_id)
            try:
                pending = self._estimated(record)
            except I2VError as error:
                rejected = RejectedJob(job=job_id, error=error)
                break  # the others are estimated once this one is out of the way
            new.append(pending)
            self._known[job_id] = job
            best = min(pending.on.values(), key=lambda it: it.seconds)
            predicted.append((job_id, best.seconds, best.peak_bytes))
        self._pending.update({it.id: it for it in new})
        self._store.note_predictions(predicted)
        unplaced = self._queues.add(new, self._store.clock())
        assert not unplaced, "an estimated job has a device"
        return rejected

    def _estimated(self, record: JobRecord) -> PendingJob:
        """The job with its estimates. Raises the last `I2VError` if it can run on no device."""
        spec = record.spec
        on: dict[str, Estimate] = {}
        problem: I2VError | None = None
        for name, estimator in self._estimators.items():
            try:
                on[name] = estimator.estimate(spec, self._architecture(spec.model))
            except I2VError as error:
                problem = error
        if not on:
            assert problem is not None
            raise problem
        failed_on = self._failed_on.get(record.id, set())
        elsewhere = {name: estimate for name, estimate in on.items() if name not in failed_on}
        return PendingJob(
            id=record.id,
            added_at=record.added_at,
            plan=plan_key(spec),
            on={name: estimate.resources for name, estimate in (elsewhere or on).items()},
            priority=spec.priority,
            position=record.position,
        )

    def _last_plan(self, device: str) -> str | None:
        last = self._store.last_started(device)
        return None if last is None else plan_key(last.spec)

    def _architecture(self, folder: Path) -> Architecture:
        if folder not in self._architectures:
            self._architectures[folder] = self._read_architecture(folder)
        return self._architectures[folder]

    def _may_run(self, job_id: int) -> bool:
        not_before = self._not_before.get(job_id)
        if not_before is None or time.monotonic() >= not_before:
            self._not_before.pop(job_id, None)
            return True
        return False

    def _forget(self, job_id: int) -> None:
        self._pending.pop(job_id, None)
        self._known.pop(job_id, None)
        if job_id in self._queues:
            self._queues.remove(job_id)
