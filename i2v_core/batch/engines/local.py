"""The engine of this machine: runs jobs on one device or several, as their memory allows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from ...errors import I2VError
from ...families import Architecture, I2VModel, load_model, read_architecture
from ...planning.margin import needed_bytes
from ...planning.plan import Plan, Stage
from ...sampling.checkpoint import Checkpointing
from ..devices.device import BatchDevice, DeviceStatus, is_device_failure
from ..execution.model_cache import ModelCache
from ..execution.running_job import RunningJob, StopJobError, StopReason
from ..jobs.store import JobStore
from ..monitoring.events import Event, EventKind, Span
from ..scheduling.policy import ScoreBreakdown
from ..scheduling.scheduler import Assignment, Scheduler
from .device_worker import DeviceWorker, device_worker
from .engine import BatchEngine
from .lifecycle import failure_report, found_report, learn_from
from .settings import EngineSettings

logger = logging.getLogger(__name__)


class LocalEngine(BatchEngine):
    """Runs jobs in threads of this process. It is the `JobSource` of its devices' pipelines.

    Args:
        load: loads a model folder.
        on_event: called for everything that happens, from the engine's threads; it must not wait for the engine.
        on_span: called with the times of every stage that has ended.
        architecture: reads the architecture of a model folder, for plans.
    """

    def __init__(
        self,
        store: JobStore,
        devices: Sequence[BatchDevice],
        settings: EngineSettings,
        load: Callable[[Path], I2VModel] = load_model,
        on_event: Callable[[Event], None] = lambda _: None,
        on_span: Callable[[Span], None] = lambda _: None,
        architecture: Callable[[Path], Architecture] = read_architecture,
    ) -> None:
        assert devices, "an engine needs a device"
        super().__init__(store, settings, on_event)
        checkpointing = Checkpointing(folder=self.work / "checkpoints", when=settings.checkpoints)
        self._workers = {it.name: device_worker(it, self, settings, checkpointing, on_span) for it in devices}
        admissions = {name: worker.admission for name, worker in self._workers.items()}
        self._scheduler = Scheduler(
            self.leases, {it.name: it for it in devices}, admissions, settings.policy, architecture
        )
        self._lifecycle = self._lifecycle_with(self._scheduler)
        self._models = ModelCache(load)

    def explain(self, job_id: int) -> dict[str, ScoreBreakdown]:
        """Why a waiting job has its place in the queue, by device."""
        found = {worker.device.name: self._scheduler.explain(job_id, worker.device.name) for worker in self._usable()}
        return {name: explanation for name, explanation in found.items() if explanation is not None}

    def status(self) -> tuple[DeviceStatus, ...]:
        held = sorted(self._held_jobs(), key=lambda job: job.id)
        return tuple(
            worker.status(
                [job.id for job in held if job.device == worker.device.name],
                self._scheduler.too_large_now(worker.device.name),
            )
            for worker in self._usable()
        )

    def _run_jobs(self) -> None:
        self.leases.reclaim_expired()
        with self._lease_keeper.running():
            for worker in self._workers.values():
                worker.pipeline.start()
            for worker in self._workers.values():
                worker.pipeline.join()
            # The pipelines' threads end before the last videos are written.
            with self._changed:
                self._changed.wait_for(lambda: not self._jobs)

    # Called by the pipelines.

    def next_job(self, device: str, *, at_once: bool = False) -> RunningJob | None:
        worker = self._workers[device]
        try:
            while not self._stopping and not worker.lost:
                job = self._take(worker)
                if job is not None or at_once:
                    return job
                with self._changed:
                    if self._is_drained():
                        self._changed.notify_all()
                        return None
                    self._changed.wait(self.settings.renew_seconds)
        except Exception as error:
            self._give_up(error)
        return None

    def on_stage(self, job: RunningJob, stage: Stage) -> None:
        job.check()
        self._on_event(Event(kind=EventKind.STAGE, job=job.id, device=job.device, words=stage.value))

    def on_batched(self, jobs: Sequence[RunningJob], plan: Plan) -> None:
        peak_bytes = max(needed_bytes(it, plan.device) for it in plan.predictions)
        self.store.note_predictions([(job.id, job.record.predicted_seconds, peak_bytes) for job in jobs])

    def on_finished(self, job: RunningJob, error: Exception | None) -> None:
        try:
            self._conclude(self._workers[job.device], job, error)
        except Exception as problem:
            self._give_up(problem)
        finally:
            self._let_go(job)

    def on_thumbnail(self, job: RunningJob, thumbnail: Image.Image) -> None:
        path = self.work / f"{job.spec.key}.jpg"
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            thumbnail.save(path)
        except OSError as error:
            logger.warning("no thumbnail of job %d: %s", job.id, error)
            return
        self.leases.show(job.id, thumbnail=path)

    # One job.

    def _take(self, worker: DeviceWorker) -> RunningJob | None:
        job = self._lifecycle.take_up(worker.device.name, self._prepare, even_if_full=worker.is_starved)
        if job is not None:
            worker.on_taken()
            self._hold(job)
        return job

    def _prepare(self, assignment: Assignment, output: Path) -> RunningJob:
        record = assignment.record
        return RunningJob(
            record=record,
            output=output,
            model=self._models.model(record.spec.model),
            plan=assignment.estimate.plan,
            latents_file=self.work / f"{record.spec.key}.latent",
        )

    def _conclude(self, worker: DeviceWorker, job: RunningJob, error: Exception | None) -> None:
        if error is None:
            self._finish(worker, job)
        elif isinstance(error, StopJobError):
            self._lifecycle.release(job)
        elif is_device_failure(error):
            # Lost first: whoever hears that the job has failed must not find the device in use still.
            self._lose(worker, error)
            self._fail(job, error)
        else:
            self._fail(job, error)
            # An `I2VError` is known to be the job's, the disk's, or for lack of memory.
            if not isinstance(error, I2VError) and worker.on_failed(job.id) and len(self._usable()) > 1:
                self._lose(worker, error)

    def _finish(self, worker: DeviceWorker, job: RunningJob) -> None:
        report = {**(found_report(job.output) or {}), "notes": job.notes}
        worker.on_done()
        if self._lifecycle.finish(job, report, job.measured_bytes):
            job.latents_file.unlink(missing_ok=True)
        if not worker.lost:
            learn_from(job, self._scheduler.estimator(worker.device.name))
            self._scheduler.has_learned()

    def _fail(self, job: RunningJob, error: Exception) -> None:
        self._lifecycle.fail(job, str(error) or repr(error), failure_report(job.reports, error))

    # The devices.

    def _usable(self) -> list[DeviceWorker]:
        return [worker for worker in self._workers.values() if not worker.lost]

    def _lose(self, worker: DeviceWorker, error: Exception) -> None:
        """Runs nothing more on a device; its other jobs go to other devices."""
        with self._changed:
            if worker.lost:
                return
            worker.lost = True
            self._changed.notify_all()
        for job in self._held_jobs():
            if job.device == worker.device.name:
                job.stop(StopReason.STOPPED)
        self._announce_lost_device(worker.device.name, str(error) or repr(error))
        if self._usable():
            self._scheduler.lose(worker.device.name)
        else:
            self._give_up(I2VError(f"the last device has failed: {error!r}", "run again to go on"))
