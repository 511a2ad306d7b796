"""Which job a device takes next: the queue as the store has it, estimated for each device, and shared out."""

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
from ..jobs.job import JobRecord, JobSpec
from ..jobs.leases import LeaseManager
from .device_queues import DeviceQueues
from .estimator import Estimate, Estimator, plan_key
from .policy import PendingJob, Policy, ScoreBreakdown, explain

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """A job that is now this engine's, with its plan, and why it was its turn."""

    record: JobRecord
    estimate: Estimate
    explanation: ScoreBreakdown


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedJob:
    """A job that no device can run, and why."""

    job: int
    error: I2VError


class Scheduler:
    """Keeps the shares in step with the store. One thread at a time is in it."""

    def __init__(
        self,
        claims: LeaseManager,
        devices: Mapping[str, PlannedDevice],
        desks: Mapping[str, AdmissionController],
        rule: Policy,
        architecture: Callable[[Path], Architecture] = read_architecture,
    ) -> None:
        self._claims, self._store = claims, claims.store
        self._desks, self._rule = desks, rule
        self._turn = threading.RLock()
        self._estimators = {
            name: Estimator(self._store, device.facts, device.budget) for name, device in devices.items()
        }
        # Each device is of a kind of its own: it has its own budget.
        self._shares = DeviceQueues({name: name for name in devices}, rule)
        self._known: dict[int, tuple[JobSpec, tuple[object, ...]]] = {}
        self._candidates: dict[int, PendingJob] = {}
        self._loaded: dict[str, str] = {}
        self._not_before: dict[int, float] = {}
        self._failed_on: dict[int, set[str]] = {}
        self._read_architecture = architecture
        self._architectures: dict[Path, Architecture] = {}
        self._learned = 0

    def next(self, device: str, *, even_if_full: bool = False) -> Assignment | RejectedJob | None:
        """The device's next job, claimed; None where there is none for it now.

        Args:
            even_if_full: also one that does not fit while other programs hold what they do: its plan is made again.
        """
        with self._turn:
            if device not in self._estimators or self._store.paused:
                return None
            refused = self._sync()
            if refused is not None:
                return refused
            desk, now = self._desks[device], self._store.clock()

            def fits(job: PendingJob) -> bool:
                return even_if_full or desk.fits_now(job.on[device].peak_bytes)

            while True:
                loaded = self._loaded.get(device)
                job = self._shares.take(device, now, loaded, fits)
                if job is None:
                    self._shares.is_idle(device, now)
                    return None
                record = self._claims.claim(job.id, device)
                self._forget(job.id)
                if record is None:  # another process was faster
                    continue
                self._loaded[device] = job.plan
                architecture = self._architecture(record.spec.model)
                return Assignment(
                    record=record,
                    estimate=self._estimators[device].estimate(record.spec, architecture),
                    explanation=explain(self._rule, job, device, now, loaded),
                )

    def explain(self, job_id: int, device: str) -> ScoreBreakdown | None:
        """Why a job has its place on a device; None where it does not wait, or does not fit there."""
        with self._turn:
            job = self._candidates.get(job_id)
            if job is None or device not in job.on:
                return None
            return explain(self._rule, job, device, self._store.clock(), self._loaded.get(device))

    def too_large_now(self, device: str) -> int:
        """How many waiting jobs would fit the device, did other programs not hold what they do."""
        with self._turn:
            peaks = [job.on[device].peak_bytes for job in self._candidates.values() if device in job.on]
        return sum(not self._desks[device].fits_now(peak_bytes) for peak_bytes in peaks)

    def estimator(self, device: str) -> Estimator:
        return self._estimators[device]

    def has_failed(self, job_id: int, device: str, seconds: float) -> None:
        """If it is tried again, then on another device where there is one, and not before so many seconds have passed:
        what made it fail may have passed by then too.
        """
        with self._turn:
            self._not_before[job_id] = time.monotonic() + seconds
            self._failed_on.setdefault(job_id, set()).add(device)

    def has_learned(self) -> None:
        """Estimates have changed: most with the first jobs."""
        with self._turn:
            self._learned += 1
            if self._learned & (self._learned - 1) == 0:
                self._known.clear()

    def lose(self, device: str) -> None:
        """The device is gone; what no other can run is refused when it is looked at next."""
        with self._turn:
            del self._estimators[device]
            self._shares.lose(device, self._store.clock())
            self._known.clear()

    def _sync(self) -> RejectedJob | None:
        """Makes the shares those of the jobs that wait now; the first job, if any, that can run nowhere."""
        waiting = {row[0]: row for row in self._store.waiting() if self._may_run(row[0])}
        for job_id in [it for it in self._candidates if it not in waiting]:
            self._forget(job_id)
        new: list[PendingJob] = []
        predicted: list[tuple[int, float, int]] = []
        refused: RejectedJob | None = None
        for job_id, row in waiting.items():
            known = self._known.get(job_id)
            if known is not None and known[1] == row:
                continue
            self._forget(job_id)
            record = self._store.job(job_id)
            try:
                candidate = self._candidate(record)
            except I2VError as error:
                refused = RejectedJob(job=job_id, error=error)
                break  # the others are looked at when this one is out of the way
            new.append(candidate)
            self._known[job_id] = record.spec, row
            best = min(candidate.on.values(), key=lambda it: it.seconds)
            predicted.append((job_id, best.seconds, best.peak_bytes))
        self._candidates.update({it.id: it for it in new})
        self._store.note_predictions(predicted)
        homeless = self._shares.add(new, self._store.clock())
        assert not homeless, "a candidate has a device"
        return refused

    def _candidate(self, record: JobRecord) -> PendingJob:
        """Raises the last `I2VError` where it can run on no device."""
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

    def _architecture(self, folder: Path) -> Architecture:
        if folder not in self._architectures:
            self._architectures[folder] = self._read_architecture(folder)
        return self._architectures[folder]

    def _may_run(self, job_id: int) -> bool:
        at = self._not_before.get(job_id)
        if at is None or time.monotonic() >= at:
            self._not_before.pop(job_id, None)
            return True
        return False

    def _forget(self, job_id: int) -> None:
        self._candidates.pop(job_id, None)
        self._known.pop(job_id, None)
        if job_id in self._shares:
            self._shares.remove(job_id)
