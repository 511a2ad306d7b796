"""Runs a queue of jobs on one device or several, by what their memory allows."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from ...errors import I2VError
from ...families import Architecture, I2VModel, load_model, read_architecture
from ...planning.margin import needed_bytes
from ...planning.plan import Plan, Stage
from ...sampling.checkpoint import Checkpointing
from ..devices.admission import AdmissionController
from ..devices.device import BatchDevice, DeviceStatus, is_device_failure
from ..execution.batching import BatchingPolicy
from ..execution.model_cache import ModelCache
from ..execution.pipeline import StagePipeline
from ..execution.running_job import RunningJob, StopJobError, StopReason
from ..execution.stage_runner import StageRunner
from ..jobs.job import JobState, StopRequest
from ..jobs.leases import LeaseManager
from ..jobs.store import JobStore
from ..monitoring.events import Event, EventKind, Span
from ..scheduling.policy import ScoreBreakdown
from ..scheduling.scheduler import Scheduler
from .device_worker import DeviceWorker
from .dispatcher import Dispatcher
from .lease_keeper import LeaseKeeper
from .lifecycle import failure_report, found_report, is_permanent, learn_from
from .settings import EngineSettings

logger = logging.getLogger(__name__)

_FAILURES_OF_A_FAILING_DEVICE = 3
"""Of different jobs, none of which is at fault as far as is known."""


class Engine:
    """Jobs of a store, on devices. `start` and `join`, or `run` for both; everything else from any thread.

    Args:
        load: a model folder into a model.
        on_event: told of everything that happens, from the engine's threads; it must not wait for the engine.
        on_span: told of every stage that has ended.
        architecture: what plans are made for, of a model folder.
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
        self.settings, self.store = settings, store
        self.claims = LeaseManager(store, lease_seconds=settings.lease_seconds)
        self.work = settings.work or store.database.path.with_name(store.database.path.name + ".work")
        self._on_event, self._on_span = on_event, on_span
        self._changed = threading.Condition()
        self._stopping = False
        self._over = threading.Event()
        self._problem: Exception | None = None
        checkpointing = Checkpointing(folder=self.work / "checkpoints", when=settings.checkpoints)
        self._stations = {device.name: self._station(device, checkpointing) for device in devices}
        desks = {name: station.desk for name, station in self._stations.items()}
        self._picker = Scheduler(self.claims, {it.name: it for it in devices}, desks, settings.policy, architecture)
        self._gate = Dispatcher(self.claims, self._picker, ModelCache(load), settings.output, self.work, on_event)
        self._heart = LeaseKeeper(self.claims, self._flights, self.wake, settings.renew_seconds)

    def run(self) -> None:
        """Until every job is over, the engine is stopped, or every device is lost."""
        self.start()
        self.join()

    def start(self) -> None:
        self.claims.reclaim_expired()
        for station in self._stations.values():
            station.lanes.start()
        heart = threading.Thread(target=self._heart.run, name="heartbeat of the queue", daemon=True)
        heart.start()
        threading.Thread(target=self._see_to_the_end, args=(heart,), name="end of the queue", daemon=True).start()

    def join(self, timeout_seconds: float | None = None) -> bool:
        """Whether it is over; waits until it is, or for so long.

        Raises:
            FileError: the queue could not be used any more; what was in hand is taken up again from its checkpoints.
            I2VError: the last device has failed.
        """
        over = self._over.wait(timeout_seconds)
        if over and self._problem is not None:
            raise self._problem
        return over

    def stop(self) -> None:
        """What runs stops within a chunk and waits in the queue, with its checkpoint; nothing more is begun."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for flight in self._flights():
            flight.stop_reason = flight.stop_reason or StopReason.STOPPED

    def pause(self) -> None:
        """Nothing more is begun; what runs runs to its end."""
        self.store.set_paused(True)

    def resume(self) -> None:
        self.store.set_paused(False)
        self.wake()

    def cancel(self, job_id: int) -> None:
        self.store.cancel(job_id)
        self._heart.apply_stop_requests({job_id: StopRequest.CANCEL})

    def pause_job(self, job_id: int) -> None:
        self.store.pause(job_id)
        self._heart.apply_stop_requests({job_id: StopRequest.PAUSE})

    def wake(self) -> None:
        """The queue has changed: there may be something to do."""
        with self._changed:
            self._changed.notify_all()

    def explain(self, job_id: int) -> dict[str, ScoreBreakdown]:
        """By device, why a waiting job has its place there."""
        found = {name: self._picker.explain(job_id, name) for name, it in self._stations.items() if not it.lost}
        return {name: explanation for name, explanation in found.items() if explanation is not None}

    def status(self) -> tuple[DeviceStatus, ...]:
        stations = [station for station in self._stations.values() if not station.lost]
        return tuple(station.status(self._picker.too_large_now(station.device.name)) for station in stations)

    # What the lanes ask.

    def next_job(self, device: str, *, at_once: bool = False) -> RunningJob | None:
        station = self._stations[device]
        try:
            while not self._ends(station):
                flight = self._take(station)
                if flight is not None or at_once:
                    return flight
                with self._changed:
                    if self._is_drained(station):
                        self._changed.notify_all()
                        return None
                    self._changed.wait(self.settings.renew_seconds)
        except Exception as error:
            self._give_up(error)
        return None

    def on_stage(self, flight: RunningJob, stage: Stage) -> None:
        flight.check()
        self._tell(EventKind.STAGE, flight.id, flight.record.device or "", stage.value)

    def on_batched(self, flights: Sequence[RunningJob], plan: Plan) -> None:
        peak_bytes = max(needed_bytes(it, plan.device) for it in plan.predictions)
        self.store.note_predictions([(it.id, it.record.predicted_seconds, peak_bytes) for it in flights])

    def on_finished(self, flight: RunningJob, error: Exception | None) -> None:
        station = self._stations[flight.record.device or ""]
        try:
            self._conclude(station, flight, error)
        except Exception as problem:
            self._give_up(problem)
        finally:
            with self._changed:
                station.flights.pop(flight.id, None)
                self._changed.notify_all()

    def on_thumbnail(self, flight: RunningJob, thumbnail: Image.Image) -> None:
        path = self.work / f"{flight.spec.key}.jpg"
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            thumbnail.save(path)
        except OSError as error:
            logger.warning("no thumbnail of job %d: %s", flight.id, error)
            return
        self.claims.show(flight.id, thumbnail=path)

    # Its own.

    def _station(self, device: BatchDevice, checkpointing: Checkpointing) -> DeviceWorker:
        desk = AdmissionController(device.room)
        runner = StageRunner(
            device=device,
            desk=desk,
            checkpointing=checkpointing,
            memory_wait_seconds=self.settings.memory_wait_seconds,
            spanned=self._on_span,
        )
        most = 1 if self.settings.max_in_flight == 1 else self.settings.clips_at_once
        return DeviceWorker(
            device,
            desk,
            StagePipeline(device.name, runner, self, self.settings.max_in_flight, BatchingPolicy(device.room, most)),
        )

    def _ends(self, station: DeviceWorker) -> bool:
        with self._changed:
            return self._stopping or station.lost

    def _take(self, station: DeviceWorker) -> RunningJob | None:
        """The device's next job, in hand; where other programs hold its memory for too long, also one that must make
        do with less.
        """
        full = time.monotonic() - station.took > self.settings.memory_wait_seconds and station.desk.is_idle
        flight = self._gate.next_job(station.device.name, even_if_full=full)
        if flight is None:
            return None
        station.took = time.monotonic()
        with self._changed:
            station.flights[flight.id] = flight
            if self._stopping:
                flight.stop_reason = StopReason.STOPPED
        return flight

    def _conclude(self, station: DeviceWorker, flight: RunningJob, error: Exception | None) -> None:
        name = station.device.name
        if error is None:
            self._done(station, flight)
        elif isinstance(error, StopJobError):
            ending = flight.stop_reason or StopReason.STOPPED
            if ending.value is not None:
                self.claims.release(flight.id, ending.value)
            self._tell(EventKind.GIVEN_BACK, flight.id, name, ending.name.lower())
        elif is_device_failure(error):
            self._fail(flight, error, name)
            self._lose(station, error)
        else:
            self._fail(flight, error, name)
            if not isinstance(error, I2VError):  # which would be of the job, the disk, or the room that there is
                station.failed_in_a_row.add(flight.id)
            if len(station.failed_in_a_row) >= _FAILURES_OF_A_FAILING_DEVICE:
                self._lose_if_others_run(station, error)

    def _done(self, station: DeviceWorker, flight: RunningJob) -> None:
        report = {**(found_report(flight.output) or {}), "notes": flight.notes}
        if self.claims.finish(flight.id, flight.output, report, flight.measured_bytes):
            flight.latents_file.unlink(missing_ok=True)
        station.failed_in_a_row.clear()
        if not station.lost:
            learn_from(flight, self._picker.estimator(station.device.name))
            self._picker.has_learned()
        self._tell(EventKind.DONE, flight.id, station.device.name, str(flight.output))

    def _fail(self, flight: RunningJob, error: Exception, device: str) -> None:
        attempts = 1 if is_permanent(error) else self.settings.attempts
        # Held back before it waits again, or another thread could take it in between.
        self._picker.has_failed(flight.id, device, self.settings.retry_seconds * 2**flight.record.attempts)
        words = str(error) or repr(error)
        state = self.claims.fail(flight.id, words, failure_report(flight.reports, error), attempts=attempts)
        self._tell(EventKind.FAILED if state is JobState.FAILED else EventKind.RETRY, flight.id, device, words)

    def _lose_if_others_run(self, station: DeviceWorker, error: Exception) -> None:
        if sum(not it.lost for it in self._stations.values()) > 1:
            self._lose(station, error)

    def _lose(self, station: DeviceWorker, error: Exception) -> None:
        """The device runs nothing more; its other jobs go to other devices."""
        with self._changed:
            if station.lost:
                return
            station.lost = True
            for flight in station.flights.values():
                flight.stop_reason = flight.stop_reason or StopReason.STOPPED
            self._changed.notify_all()
        self._tell(EventKind.DEVICE_LOST, None, station.device.name, str(error) or repr(error))
        if any(not it.lost for it in self._stations.values()):
            self._picker.lose(station.device.name)
        else:
            self._give_up(I2VError(f"the last device has failed: {error!r}", "run again to go on"))

    def _is_drained(self, station: DeviceWorker) -> bool:
        """Whether there is nothing more to come for a device: jobs in hand elsewhere may come back."""
        if self.settings.waits_for_more:
            return False
        if any(it.flights for it in self._stations.values() if it is not station) or station.flights:
            return False
        counts = self.store.counts()
        # What other processes run may come back too, if they end in the middle.
        return not counts[JobState.WAITING] and not counts[JobState.RUNNING]

    def _flights(self) -> list[RunningJob]:
        with self._changed:
            return [flight for station in self._stations.values() for flight in station.flights.values()]

    def _see_to_the_end(self, heart: threading.Thread) -> None:
        for station in self._stations.values():
            station.lanes.join()
        for flight in self._flights():
            flight.finished.wait()
        self._heart.stop()
        heart.join()
        self._over.set()

    def _give_up(self, error: Exception) -> None:
        """The queue itself cannot be used, or no device."""
        logger.error("the batch ends: %s", error, exc_info=None if isinstance(error, I2VError) else error)
        self._problem = self._problem or error
        self.stop()

    def _tell(self, kind: EventKind, job: int | None, device: str, words: str) -> None:
        self._on_event(Event(kind=kind, job=job, device=device, words=words))
