"""The engine of a Ray cluster: a worker for each card, which Ray places, starts, and restarts when it ends.

Only the driver touches the queue's file; workers are handed jobs and return how they ended. Models, pictures and the
output folder must be at the same paths on every machine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import I2VError
from ..devices.admission import AdmissionController
from ..devices.device import DeviceStatus
from ..execution.ready_queue import max_jobs
from ..execution.running_job import HeldJob, StopReason
from ..jobs.job import JobState
from ..jobs.store import JobStore
from ..monitoring.events import Event
from ..scheduling.scheduler import Assignment, Scheduler
from .engine import BatchEngine
from .lifecycle import found_report
from .ray_cluster import connect, import_ray, worker_resources
from .ray_worker import BatchWorker, JobResult, RemoteDevice, WorkerDescription
from .settings import EngineSettings

logger = logging.getLogger(__name__)

_START_SECONDS, _RESTARTS = 120.0, 3
_RESTART_POLL_SECONDS = 0.5
_SPARE_THREADS = 4
"""Threads of a worker beyond those that run jobs: to describe itself, report progress, and stop jobs."""


@dataclass(slots=True, eq=False)
class _Worker:
    name: str
    handle: Any
    device: RemoteDevice
    restarting: Any = None
    """Reference to the answer of a worker that was lost, which comes when Ray has restarted it."""


@dataclass(slots=True, kw_only=True, eq=False)
class _RemoteJob(HeldJob):
    worker: _Worker

    def stop(self, reason: StopReason) -> None:
        HeldJob.stop(self, reason)  # super() does not work in a class with slots that a decorator has made anew
        self.worker.handle.stop.remote(self.spec.key)


class RayEngine(BatchEngine):
    """Runs jobs on the devices of a cluster.

    Args:
        address: of the cluster, `auto` for the one that this machine is part of, or `LOCAL`.
        limit_bytes: memory to use of each device; None: all.
        reserve_bytes: memory to leave free on each device.
        cpu_workers: number of workers where the cluster has no cards.
        on_event: called for everything that happens, from the engine's threads; it must not wait for the engine.

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
        super().__init__(store, settings, on_event)
        self._ray = import_ray()
        self._address, self._cpu_workers = address, cpu_workers
        self._limit_bytes, self._reserve_bytes = limit_bytes, reserve_bytes
        # So many for each worker, that a batch of the size that was asked for can be made there.
        one_by_one = settings.max_in_flight == 1
        self._max_jobs = max_jobs(settings.max_in_flight, 1 if one_by_one else settings.clips_at_once or 1)
        self._workers: dict[str, _Worker] = {}
        self._by_ref: dict[Any, _RemoteJob] = {}

    def status(self) -> tuple[DeviceStatus, ...]:
        return tuple(
            DeviceStatus(
                name=worker.name,
                room=worker.device.room(),
                reserved_bytes=0,
                jobs=tuple(job.id for job in self._jobs_of(worker)),
                waits=(),
            )
            for worker in self._all_workers()
        )

    def worker_pids(self) -> dict[str, int]:
        return {worker.name: worker.device.description.pid for worker in self._all_workers()}

    def _run_jobs(self) -> None:
        connect(self._ray, self._address, self._cpu_workers)
        try:
            self._start_workers()
            self.leases.reclaim_expired()
            with self._lease_keeper.running():
                self._drive()
        finally:
            # Ray would start a new cluster for a call that comes after its shutdown.
            with self._changed:
                self._jobs.clear()
                self._by_ref.clear()
            self._ray.shutdown()

    def _start_workers(self) -> None:
        settings = replace(self.settings, work=self.work)
        actor = self._ray.remote(BatchWorker)
        threads = self._max_jobs + _SPARE_THREADS
        handles = [
            actor.options(max_restarts=_RESTARTS, max_concurrency=threads, **resources).remote(
                settings, self._limit_bytes, self._reserve_bytes
            )
            for resources in worker_resources(self._ray, self._cpu_workers)
        ]
        asked = {handle.describe.remote(): handle for handle in handles}
        ready, late = self._ray.wait(list(asked), num_returns=len(asked), timeout=_START_SECONDS)
        for ref in late:
            logger.warning("a worker has not started within %.0f s and is left out", _START_SECONDS)
            self._ray.kill(asked[ref])
        for index, ref in enumerate(ready):
            try:
                description: WorkerDescription = self._ray.get(ref)
            except self._ray.exceptions.RayError as error:
                logger.warning("a worker has not started and is left out: %s", error)
                continue
            device = RemoteDevice(name=f"worker {index}", description=description)
            self._workers[device.name] = _Worker(device.name, asked[ref], device)
        if not self._workers:
            raise I2VError("no worker could be started on the cluster", "look at `ray status` and the workers' logs")
        devices = {name: worker.device for name, worker in self._workers.items()}
        admissions = {name: AdmissionController(device.room) for name, device in devices.items()}
        self._scheduler = Scheduler(self.leases, devices, admissions, self.settings.policy)
        self._lifecycle = self._lifecycle_with(self._scheduler)

    def _drive(self) -> None:
        while True:
            if not self._stopping:
                self._hand_out_jobs()
            if not self._by_ref and (self._stopping or self._is_drained()):
                return
            workers = self._all_workers()
            if not workers:
                raise I2VError(
                    "every worker of the cluster is lost", "look at the workers' logs, and run again to go on"
                )
            refs = [*self._by_ref, *(worker.restarting for worker in workers if worker.restarting is not None)]
            if refs:
                ready, _ = self._ray.wait(refs, num_returns=1, timeout=self.settings.renew_seconds)
                for ref in ready:
                    self._settle(ref)
                continue
            with self._changed:
                if not self._stopping:
                    self._changed.wait(self.settings.renew_seconds)

    def _hand_out_jobs(self) -> None:
        """Hands out jobs, one to each worker in turn, as long as any takes one."""
        workers = self._all_workers()
        while workers:
            workers = [worker for worker in workers if self._has_room(worker) and self._hand_out_to(worker)]

    def _has_room(self, worker: _Worker) -> bool:
        return worker.restarting is None and len(self._jobs_of(worker)) < self._max_jobs

    def _hand_out_to(self, worker: _Worker) -> bool:
        def prepare(assignment: Assignment, output: Path) -> _RemoteJob:
            return _RemoteJob(record=assignment.record, output=output, worker=worker)

        job = self._lifecycle.take_up(worker.name, prepare)
        if job is None:
            return False
        ref = worker.handle.run.remote(job.spec.as_dict())
        with self._changed:
            self._by_ref[ref] = job
        self._hold(job)
        return True

    def _settle(self, ref: Any) -> None:
        """Handles an answer of a worker: a job that has ended, or its restart."""
        if ref not in self._by_ref:
            self._on_restarted(next(worker for worker in self._all_workers() if worker.restarting == ref))
            return
        with self._changed:
            job = self._by_ref.pop(ref)
        try:
            result: JobResult = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            self._on_lost(job, error)
        else:
            self._conclude(job, result)
        finally:
            self._let_go(job)

    def _conclude(self, job: _RemoteJob, result: JobResult) -> None:
        if result.worker_lost:
            self._replace(job.worker, is_alive=True)
        if result.state is JobState.DONE:
            thumbnail = self.work / f"{job.spec.key}.jpg"
            if thumbnail.exists():
                self.leases.show(job.id, thumbnail=thumbnail)
            self._lifecycle.finish(job, result.report or found_report(job.output), result.measured_bytes)
        elif result.state is JobState.FAILED:
            self._lifecycle.fail(job, result.problem or "", result.report or {})
        else:
            self._lifecycle.release(job)

    def _on_lost(self, job: _RemoteJob, error: Exception) -> None:
        """Fails the job of a lost worker, so that it continues elsewhere, and has the worker replaced."""
        words = str(getattr(error, "cause", None) or error) or repr(error)
        self._replace(job.worker, is_alive=isinstance(error, self._ray.exceptions.RayTaskError))
        self._lifecycle.fail(job, f"the worker was lost ({words.splitlines()[0]})", {})

    def _replace(self, worker: _Worker, *, is_alive: bool) -> None:
        """Has Ray restart a worker whose process has ended, or is alive but can run nothing more."""
        if worker.restarting is not None:
            return
        if is_alive:
            self._ray.kill(worker.handle, no_restart=False)
        worker.restarting = worker.handle.describe.remote()
        self._announce_lost_device(worker.name, "the worker was lost; Ray restarts it")

    def _on_restarted(self, worker: _Worker) -> None:
        try:
            description = self._ray.get(worker.restarting)
        except self._ray.exceptions.ActorUnavailableError:
            # It is being restarted still, and Ray does not wait for that.
            with self._changed:
                self._changed.wait(min(self.settings.renew_seconds, _RESTART_POLL_SECONDS))
            worker.restarting = worker.handle.describe.remote()
            return
        except self._ray.exceptions.RayError as error:
            logger.warning("%s is lost for good: %s", worker.name, error)
            with self._changed:
                del self._workers[worker.name]
            if self._workers:
                self._scheduler.lose(worker.name)
            return
        worker.device, worker.restarting = RemoteDevice(name=worker.name, description=description), None

    def _refresh_progress(self) -> None:
        """Asks every worker at once; one that does not answer in time keeps its last progress."""
        busy = [worker for worker in self._all_workers() if worker.restarting is None and self._jobs_of(worker)]
        if not busy:
            return
        asked = {worker.handle.progress.remote(): worker for worker in busy}
        ready, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=self.settings.renew_seconds)
        for ref in ready:
            try:
                by_key: dict[str, tuple[str, int, int]] = self._ray.get(ref)
            except self._ray.exceptions.RayError:  # the answer to its jobs tells the same
                continue
            for job in self._jobs_of(asked[ref]):
                job.progress = by_key.get(job.spec.key, job.progress)

    def _all_workers(self) -> list[_Worker]:
        with self._changed:
            return list(self._workers.values())

    def _jobs_of(self, worker: _Worker) -> list[_RemoteJob]:
        with self._changed:
            return [job for job in self._by_ref.values() if job.worker is worker]
