"""The same queue on a Ray cluster: a worker for each card, which Ray places, starts and starts again.

The driver alone touches the queue's file; workers are handed jobs and give back how they ended. Models, pictures and
the output folder must be at the same paths on every machine.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...errors import I2VError
from ..devices.admission import AdmissionController
from ..devices.device import DeviceStatus
from ..jobs.job import JobRecord, JobState, StopRequest
from ..jobs.leases import LeaseManager
from ..jobs.store import JobStore
from ..monitoring.events import Event, EventKind
from ..monitoring.messages import score_message
from ..scheduling.scheduler import Assignment, RejectedJob, Scheduler
from .lifecycle import found_report
from .ray_cluster import connect, import_ray, placements
from .ray_worker import BatchWorker, JobResult, RemoteDevice
from .settings import EngineSettings

logger = logging.getLogger(__name__)

_START_SECONDS, _RESTARTS = 120.0, 3


@dataclass(slots=True, eq=False)
class _Worker:
    name: str
    handle: Any
    device: RemoteDevice
    jobs: dict[int, JobRecord] = field(default_factory=dict[int, JobRecord])
    coming_back: Any = None
    """A question to a worker that was lost, which Ray answers when it has started it again."""


class RayEngine:
    """As `Engine`, with the devices of a cluster.

    Args:
        address: of the cluster, `auto` for the one that this machine is part of, or `LOCAL`.
        cpu_workers: where the cluster has no cards, so many workers are started on its processors.

    Raises:
        MissingPackageError: Ray is not installed.
    """

    def __init__(
        self,
        store: JobStore,
        address: str,
        settings: EngineSettings,
        limit_bytes: int | None = None,
        reserve_bytes: int = 0,
        cpu_workers: int = 1,
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> None:
        self._ray = import_ray()
        self.store, self.settings = store, settings
        self.claims = LeaseManager(store, lease_seconds=settings.lease_seconds)
        self.work = settings.work or store.database.path.with_name(store.database.path.name + ".work")
        self._address, self._cpu_workers = address, cpu_workers
        self._limit_bytes, self._reserve_bytes = limit_bytes, reserve_bytes
        self._on_event = on_event
        self._workers: dict[str, _Worker] = {}
        self._flying: dict[Any, tuple[_Worker, int]] = {}
        self._stopping = threading.Event()
        self._over = threading.Event()
        self._problem: Exception | None = None

    def start(self) -> None:
        threading.Thread(target=self._run, name="driver of the cluster", daemon=True).start()

    def join(self, timeout_seconds: float | None = None) -> bool:
        """As `Engine.join`."""
        over = self._over.wait(timeout_seconds)
        if over and self._problem is not None:
            raise self._problem
        return over

    def stop(self) -> None:
        self._stopping.set()

    def status(self) -> tuple[DeviceStatus, ...]:
        return tuple(
            DeviceStatus(
                name=worker.name, room=worker.device.room(), reserved_bytes=0, jobs=tuple(worker.jobs), waits=()
            )
            for worker in list(self._workers.values())
        )

    def worker_pids(self) -> dict[str, int]:
        return {name: worker.device.description.pid for name, worker in self._workers.items()}

    def _run(self) -> None:
        try:
            self._connect()
            try:
                self._drive()
            finally:
                self._ray.shutdown()
        except Exception as error:
            self._problem = error
        self._over.set()

    def _connect(self) -> None:
        connect(self._ray, self._address, self._cpu_workers)
        settings = EngineSettings(
            output=self.settings.output,
            work=self.work,
            max_in_flight=self.settings.max_in_flight,
            memory_wait_seconds=self.settings.memory_wait_seconds,
            checkpoints=self.settings.checkpoints,
            renew_seconds=self.settings.renew_seconds,
        )
        actor = self._ray.remote(BatchWorker)
        handles = [
            actor.options(max_restarts=_RESTARTS, max_concurrency=self.settings.max_in_flight + 4, **needs).remote(
                settings, self._limit_bytes, self._reserve_bytes
            )
            for needs in placements(self._ray, self._cpu_workers)
        ]
        asked = {handle.describe.remote(): handle for handle in handles}
        ready, late = self._ray.wait(list(asked), num_returns=len(asked), timeout=_START_SECONDS)
        for ref in late:
            logger.warning("a worker has not started within %.0f s and is left out", _START_SECONDS)
            self._ray.kill(asked[ref])
        for index, ref in enumerate(ready):
            device = RemoteDevice(name=f"worker {index}", description=self._ray.get(ref))
            self._workers[device.name] = _Worker(device.name, asked[ref], device)
        if not self._workers:
            raise I2VError("no worker could be started on the cluster", "look at `ray status` and the workers' logs")
        devices = {name: worker.device for name, worker in self._workers.items()}
        desks = {name: AdmissionController(device.room) for name, device in devices.items()}
        self._picker = Scheduler(self.claims, devices, desks, self.settings.policy)

    def _drive(self) -> None:
        self.claims.reclaim_expired()
        renewed = told_to_stop = 0.0
        while True:
            if self._stopping.is_set() and not told_to_stop:
                told_to_stop = time.monotonic()
                self._end_all(StopRequest.PAUSE)
            if not self._stopping.is_set():
                self._fill()
            waiting_for = [*self._flying, *(it.coming_back for it in self._workers.values() if it.coming_back)]
            if not self._flying and (self._stopping.is_set() or self._is_drained()):
                return
            if waiting_for:
                ready, _ = self._ray.wait(waiting_for, num_returns=1, timeout=self.settings.renew_seconds)
                for ref in ready:
                    self._settle(ref)
            else:
                self._stopping.wait(self.settings.renew_seconds)
            if time.monotonic() - renewed >= self.settings.renew_seconds:
                renewed = time.monotonic()
                self._renew()

    def _is_drained(self) -> bool:
        if not self._workers:
            raise I2VError("every worker of the cluster is lost", "look at the workers' logs, and run again to go on")
        counts = self.store.counts()
        return not counts[JobState.WAITING] and not counts[JobState.RUNNING]

    def _fill(self) -> None:
        """Hands out jobs, one to each worker in turn, as long as they take any."""
        given = True
        while given:
            given = False
            for worker in list(self._workers.values()):
                if worker.coming_back is None and len(worker.jobs) < self.settings.max_in_flight:
                    pick = self._picker.next(worker.name)
                    given = given or pick is not None
                    if isinstance(pick, Assignment):
                        self._hand_out(worker, pick)
                    elif isinstance(pick, RejectedJob) and self.claims.claim(pick.job, worker.name):
                        self._set_aside(pick.job, worker.name, str(pick.error))

    def _hand_out(self, worker: _Worker, pick: Assignment) -> None:
        record = pick.record
        ref = worker.handle.run.remote(record.spec.as_dict())
        worker.jobs[record.id] = record
        self._flying[ref] = worker, record.id
        self._tell(EventKind.STARTED, record.id, worker.name, str(score_message(pick.explanation)))

    def _settle(self, ref: Any) -> None:
        if ref not in self._flying:
            self._came_back(next(worker for worker in self._workers.values() if worker.coming_back == ref))
            return
        worker, job_id = self._flying.pop(ref)
        record = worker.jobs.pop(job_id)
        try:
            outcome: JobResult = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            self._lost(worker, job_id, str(error))
            return
        self._conclude(worker, record, outcome)

    def _conclude(self, worker: _Worker, record: JobRecord, outcome: JobResult) -> None:
        if outcome.state is JobState.DONE:
            output = self.settings.output / record.spec.output_name
            thumbnail = self.work / f"{record.spec.key}.jpg"
            if thumbnail.exists():
                self.claims.show(record.id, thumbnail=thumbnail)
            report = outcome.report or found_report(output)
            self.claims.finish(record.id, output, report, outcome.measured_bytes)
            self._tell(EventKind.DONE, record.id, worker.name, str(output))
        elif outcome.state is JobState.FAILED:
            attempts = 1 if outcome.is_permanent else self.settings.attempts
            self._failed(worker, record.id, outcome.problem or "", outcome.report or {}, attempts)
        else:
            # What was asked to pause since the batch is to stop waits for the next.
            is_stop = self._stopping.is_set() and outcome.state is JobState.PAUSED
            self.claims.release(record.id, JobState.WAITING if is_stop else outcome.state)
            self._tell(EventKind.GIVEN_BACK, record.id, worker.name, outcome.state.value)

    def _failed(self, worker: _Worker, job_id: int, problem: str, report: dict[str, Any], attempts: int) -> None:
        self._picker.has_failed(job_id, worker.name, self.settings.retry_seconds)
        state = self.claims.fail(job_id, problem, report, attempts=attempts)
        self._tell(EventKind.FAILED if state is JobState.FAILED else EventKind.RETRY, job_id, worker.name, problem)

    def _set_aside(self, job_id: int, worker: str, problem: str) -> None:
        self.claims.fail(job_id, problem, {}, attempts=1)
        self._tell(EventKind.FAILED, job_id, worker, problem)

    def _lost(self, worker: _Worker, job_id: int, problem: str) -> None:
        """The job goes to another worker, and on from its checkpoint; Ray starts this one again."""
        if worker.coming_back is None:
            worker.coming_back = worker.handle.describe.remote()
            self._tell(EventKind.DEVICE_LOST, None, worker.name, "its process has ended; Ray starts it again")
        self._failed(worker, job_id, f"the worker was lost ({problem.splitlines()[0]})", {}, self.settings.attempts)

    def _came_back(self, worker: _Worker) -> None:
        try:
            description = self._ray.get(worker.coming_back)
        except self._ray.exceptions.RayError as error:
            logger.warning("%s is lost for good: %s", worker.name, error)
            del self._workers[worker.name]
            if self._workers:
                self._picker.lose(worker.name)
            return
        worker.device, worker.coming_back = RemoteDevice(name=worker.name, description=description), None

    def _renew(self) -> None:
        progress: dict[int, tuple[str, int, int]] = {}
        for worker in self._workers.values():
            if worker.jobs and worker.coming_back is None:
                progress |= self._progress_of(worker)
        wishes = self.claims.renew(progress)
        for worker in self._workers.values():
            for job_id, record in worker.jobs.items():
                wish = wishes.get(job_id)
                if wish is not None:
                    worker.handle.end.remote(record.spec.key, wish)
        self.claims.reclaim_expired()

    def _progress_of(self, worker: _Worker) -> dict[int, tuple[str, int, int]]:
        try:
            by_key = self._ray.get(worker.handle.progress.remote(), timeout=self.settings.renew_seconds)
        except self._ray.exceptions.RayError:
            return {}
        keys = {record.spec.key: job_id for job_id, record in worker.jobs.items()}
        return {keys[key]: at for key, at in by_key.items() if key in keys and at[0]}

    def _end_all(self, wish: StopRequest) -> None:
        for worker in self._workers.values():
            for record in worker.jobs.values():
                worker.handle.end.remote(record.spec.key, wish)

    def _tell(self, kind: EventKind, job: int | None, device: str, words: str) -> None:
        self._on_event(Event(kind=kind, job=job, device=device, words=words))
