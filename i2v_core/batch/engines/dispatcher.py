"""From a job in the queue to one in hand: those that cannot run, or are done already, are concluded on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...errors import I2VError
from ..execution.model_cache import ModelCache
from ..execution.running_job import RunningJob
from ..jobs.leases import LeaseManager
from ..monitoring.events import Event, EventKind
from ..monitoring.messages import score_message
from ..scheduling.scheduler import Assignment, RejectedJob, Scheduler
from .lifecycle import failure_report, found_report


class Dispatcher:
    """`output` is the folder of the videos, `work` that of what jobs go on from."""

    def __init__(
        self,
        claims: LeaseManager,
        picker: Scheduler,
        models: ModelCache,
        output: Path,
        work: Path,
        on_event: Callable[[Event], None],
    ) -> None:
        self._claims, self._picker, self._models = claims, picker, models
        self._output, self._work, self._on_event = output, work, on_event

    def next_job(self, device: str, *, even_if_full: bool) -> RunningJob | None:
        """The device's next job, which is this engine's now; None where there is none for it."""
        while (pick := self._picker.next(device, even_if_full=even_if_full)) is not None:
            flight = self._refuse(pick, device) if isinstance(pick, RejectedJob) else self._board(pick, device)
            if flight is not None:
                return flight
        return None

    def _board(self, pick: Assignment, device: str) -> RunningJob | None:
        record = pick.record
        output = self._output / record.spec.output_name
        if output.exists():
            # Its process ended between the last write and the note of it: a file of that name is whole.
            self._claims.finish(record.id, output, found_report(output), None)
            self._tell(EventKind.FOUND, record.id, device, str(output))
            return None
        try:
            model = self._models.model(record.spec.model)
        except I2VError as error:
            self._set_aside(record.id, device, error)
            return None
        self._tell(EventKind.STARTED, record.id, device, str(score_message(pick.explanation)))
        return RunningJob(
            record=record,
            model=model,
            plan=pick.estimate.plan,
            output=output,
            latents_file=self._work / f"{record.spec.key}.latent",
        )

    def _refuse(self, refused: RejectedJob, device: str) -> None:
        if self._claims.claim(refused.job, device) is not None:
            self._set_aside(refused.job, device, refused.error)

    def _set_aside(self, job_id: int, device: str, error: I2VError) -> None:
        """A claimed job that cannot run at all."""
        self._claims.fail(job_id, str(error), failure_report((), error), attempts=1)
        self._tell(EventKind.FAILED, job_id, device, str(error))

    def _tell(self, kind: EventKind, job: int, device: str, words: str) -> None:
        self._on_event(Event(kind=kind, job=job, device=device, words=words))
