"""The interface of both engines, and the half that they share: leases, stopping, steering, and the end."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

from ...errors import I2VError
from ..devices.device import DeviceStatus
from ..execution.running_job import HeldJob, StopReason
from ..jobs.job import JobState, StopRequest
from ..jobs.leases import LeaseManager
from ..jobs.store import JobStore
from ..monitoring.events import Event, EventKind
from ..scheduling.scheduler import Scheduler
from .lease_keeper import LeaseKeeper
from .lifecycle import JobLifecycle
from .settings import EngineSettings

logger = logging.getLogger(__name__)


class BatchEngine(ABC):
    """Runs the jobs of a store. Its methods may be called from any thread.

    ```
    engine = LocalEngine(store, local_devices(None, 0, calibration), EngineSettings(output=folder))
    engine.start()
    while not engine.join(timeout_seconds=0.5):
        show(engine.status())
    ```

    Args:
        on_event: called for everything that happens, from the engine's threads; it must not wait for the engine.
    """

    def __init__(self, store: JobStore, settings: EngineSettings, on_event: Callable[[Event], None]) -> None:
        self.store, self.settings = store, settings
        self.work = settings.work or store.database.path.with_name(store.database.path.name + ".work")
        self.leases = LeaseManager(store, lease_seconds=settings.lease_seconds)
        self._on_event = on_event
        self._lease_keeper = LeaseKeeper(
            self.leases, self._held_jobs, self.wake, settings.renew_seconds, self._refresh_progress
        )
        self._changed = threading.Condition()
        self._jobs: set[HeldJob] = set()
        self._stopping = False
        self._over = threading.Event()
        self._problem: Exception | None = None

    @abstractmethod
    def status(self) -> tuple[DeviceStatus, ...]:
        """Memory, jobs and waits of each device that is not lost."""

    @abstractmethod
    def _run_jobs(self) -> None:
        """Runs jobs until the queue is drained, the engine is stopped, or no device is left."""

    def run(self) -> None:
        """Starts the engine and waits for its end, as `start` and `join` do."""
        self.start()
        self.join()

    def start(self) -> None:
        threading.Thread(target=self._main, name="batch engine", daemon=True).start()

    def join(self, timeout_seconds: float | None = None) -> bool:
        """Waits until the engine has ended, or for so long; whether it has.

        Raises:
            FileError: the queue could not be used any more; jobs that ran continue from their checkpoints next time.
            I2VError: the last device has failed, or the cluster cannot be used.
        """
        over = self._over.wait(timeout_seconds)
        if over and self._problem is not None:
            raise self._problem
        return over

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    def stop(self) -> None:
        """Begins nothing more. Running jobs stop within a chunk and wait in the queue, with their checkpoints."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for job in self._held_jobs():
            job.stop(StopReason.STOPPED)

    def pause(self) -> None:
        """Begins nothing more; running jobs run to their end."""
        self.store.set_paused(True)

    def resume(self) -> None:
        self.store.set_paused(False)
        self.wake()

    def cancel(self, job_id: int) -> None:
        self.store.cancel(job_id)
        self._lease_keeper.apply_stop_requests({job_id: StopRequest.CANCEL})

    def pause_job(self, job_id: int) -> None:
        self.store.pause(job_id)
        self._lease_keeper.apply_stop_requests({job_id: StopRequest.PAUSE})

    def wake(self) -> None:
        """Makes idle devices look at the queue, which has changed."""
        with self._changed:
            self._changed.notify_all()

    def _main(self) -> None:
        try:
            self._run_jobs()
        except Exception as error:
            self._give_up(error)
        finally:
            self._over.set()

    def _lifecycle_with(self, scheduler: Scheduler) -> JobLifecycle:
        return JobLifecycle(self.leases, scheduler, self.settings, self._is_running, self._on_event)

    def _is_running(self, job_id: int) -> bool:
        return any(job.id == job_id and not job.concluded for job in self._held_jobs())

    def _held_jobs(self) -> list[HeldJob]:
        with self._changed:
            return list(self._jobs)

    def _hold(self, job: HeldJob) -> None:
        """Keeps the job's lease from now on."""
        with self._changed:
            self._jobs.add(job)
            stopping = self._stopping
        if stopping:
            job.stop(StopReason.STOPPED)

    def _let_go(self, job: HeldJob) -> None:
        with self._changed:
            self._jobs.discard(job)
            self._changed.notify_all()

    def _refresh_progress(self) -> None:  # noqa: B027 (only a cluster needs it)
        """Brings the held jobs' progress up to date, where that takes asking."""

    def _is_drained(self) -> bool:
        """Whether no more jobs are to be expected. Jobs that other processes run may come back, if those end early."""
        if self.settings.waits_for_more:
            return False
        counts = self.store.counts()
        return not counts[JobState.WAITING] and not counts[JobState.RUNNING]

    def _give_up(self, error: Exception) -> None:
        """Stops because the queue, the cluster, or every device cannot be used any more."""
        logger.error("the batch ends: %s", error, exc_info=None if isinstance(error, I2VError) else error)
        self._problem = self._problem or error
        self.stop()

    def _announce_lost_device(self, device: str, problem: str) -> None:
        self._on_event(Event(kind=EventKind.DEVICE_LOST, job=None, device=device, words=problem))
