"""The way of a job through an engine: taken up, then finished, failed, tried again, or released.

Both engines move jobs through here and nowhere else. So leases, the back-off of retries, and events mean the same
whether stages run in this process or on a cluster.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ...errors import BadInputError, DoesNotFitError, I2VError, ModelFolderError, PlanMismatchError, RanOutError
from ...run_report import report_path
from ...stages import StageReport
from ..execution.running_job import HeldJob, RunningJob, StopReason
from ..jobs.job import JobState
from ..jobs.leases import LeaseManager
from ..monitoring.events import Event, EventKind
from ..monitoring.messages import score_message
from ..scheduling.estimator import Estimator
from ..scheduling.scheduler import Assignment, RejectedJob, Scheduler
from .settings import EngineSettings

JobT = TypeVar("JobT", bound=HeldJob)


class JobLifecycle:
    """Moves jobs between the states of the queue, and announces each move that has taken place.

    A move of a job whose lease was lost changes nothing in the queue, and is announced as `GIVEN_BACK`: lost.

    Args:
        is_running: whether this engine still runs a job of that id.
        on_event: called from the engine's threads.
    """

    def __init__(
        self,
        leases: LeaseManager,
        scheduler: Scheduler,
        settings: EngineSettings,
        is_running: Callable[[int], bool],
        on_event: Callable[[Event], None],
    ) -> None:
        self._leases, self._scheduler, self._settings = leases, scheduler, settings
        self._is_running, self._on_event = is_running, on_event

    def take_up(
        self, device: str, prepare: Callable[[Assignment, Path], JobT], *, even_if_full: bool = False
    ) -> JobT | None:
        """The device's next job that is to run, claimed and announced as started; None where there is none now.

        On the way, jobs that cannot run are set aside, and jobs whose video exists are finished.

        Args:
            prepare: makes the engine's job of an assignment and the path of its video. Where it raises an `I2VError`,
                the job is set aside.
            even_if_full: also a job that does not fit while other programs hold what they do.
        """
        while (choice := self._scheduler.next(device, even_if_full=even_if_full)) is not None:
            if isinstance(choice, RejectedJob):
                if self._leases.claim(choice.job, device) is not None:
                    self._set_aside(choice.job, device, choice.error)
            elif (job := self._start(choice, device, prepare)) is not None:
                return job
        return None

    def finish(self, job: HeldJob, report: Mapping[str, Any] | None, measured_bytes: int | None) -> bool:
        """Marks a job as done; False where its lease was lost, since another process runs it by now."""
        job.concluded = True
        if not self._leases.finish(job.id, job.output, report, measured_bytes):
            self._announce_lost(job)
            return False
        self._announce(EventKind.DONE, job.id, job.device, str(job.output))
        return True

    def fail(self, job: HeldJob, problem: str, report: Mapping[str, Any]) -> None:
        """Decides whether a failed job is tried again, and when.

        Args:
            report: as `failure_report` makes it; a permanent failure is not tried again.
        """
        attempts = 1 if report.get("permanent") else self._settings.attempts
        back_off_seconds = self._settings.retry_seconds * 2**job.record.attempts
        # Held back before it waits again, or another thread could take it in between.
        self._scheduler.has_failed(job.id, job.device, back_off_seconds)
        job.concluded = True
        state = self._leases.fail(job.id, problem, report, attempts=attempts)
        if state is None:
            self._announce_lost(job)
        elif state is JobState.FAILED:
            self._announce(EventKind.FAILED, job.id, job.device, problem)
        elif state is JobState.WAITING:
            self._announce(EventKind.RETRY, job.id, job.device, problem)
        else:  # it was to be paused or cancelled anyway
            self._announce(EventKind.GIVEN_BACK, job.id, job.device, state.value)

    def release(self, job: HeldJob) -> None:
        """Gives a job that was stopped back to the queue, in the state that its stop reason says."""
        reason = StopReason.STOPPED if job.stop_reason in (None, StopReason.LOST) else job.stop_reason
        assert reason is not None
        assert reason.value is not None
        job.concluded = True
        # Tried for a lost job too: if this engine has claimed it again since, it would be held for ever. A lease of
        # another process is not touched.
        if self._leases.release(job.id, reason.value):
            self._announce(EventKind.GIVEN_BACK, job.id, job.device, reason.name.lower())
        else:
            self._announce_lost(job)

    def _start(self, assignment: Assignment, device: str, prepare: Callable[[Assignment, Path], JobT]) -> JobT | None:
        record = assignment.record
        if self._is_running(record.id):
            # The lease had expired and was claimed again before this engine's own run of the job noticed: that run
            # holds it again.
            return None
        output = self._settings.output / record.spec.output_name
        if output.exists():
            # Only whole videos have this name: the process that wrote it ended before it could say so.
            if self._leases.finish(record.id, output, found_report(output), None):
                self._announce(EventKind.FOUND, record.id, device, str(output))
            return None
        try:
            job = prepare(assignment, output)
        except I2VError as error:
            self._set_aside(record.id, device, error)
            return None
        self._announce(EventKind.STARTED, record.id, device, str(score_message(assignment.explanation)))
        return job

    def _set_aside(self, job_id: int, device: str, error: I2VError) -> None:
        """Fails a claimed job that cannot run at all."""
        if self._leases.fail(job_id, str(error), failure_report((), error), attempts=1) is not None:
            self._announce(EventKind.FAILED, job_id, device, str(error))

    def _announce_lost(self, job: HeldJob) -> None:
        self._announce(EventKind.GIVEN_BACK, job.id, job.device, StopReason.LOST.name.lower())

    def _announce(self, kind: EventKind, job: int, device: str, words: str) -> None:
        self._on_event(Event(kind=kind, job=job, device=device, words=words))


def is_permanent(error: Exception) -> bool:
    """Whether a job would fail again, however often it is tried: its request itself is at fault."""
    if isinstance(error, RanOutError):
        return False
    return isinstance(error, (BadInputError, DoesNotFitError, ModelFolderError, PlanMismatchError))


def failure_report(reports: Sequence[StageReport], error: Exception) -> dict[str, Any]:
    """The report of a failed job: the stages that went well, the error, and its cause."""
    return {
        "stages": [report.as_dict() for report in reports],
        "permanent": is_permanent(error),
        "error": f"{type(error).__name__}: {error}",
        "cause": traceback.format_exception_only(error.__cause__) if error.__cause__ else [],
    }


def found_report(output: Path) -> dict[str, Any] | None:
    """The report beside a video; None where there is none to be read."""
    try:
        report: dict[str, Any] = json.loads(report_path(output).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return report


def learn_from(job: RunningJob, estimator: Estimator) -> None:
    """Learns the seconds of a job's stages, except of those that ran out of memory or were shared with other jobs."""
    for report in job.reports:
        if not report.failed and report.plan.request.clips == 1:
            steps = max(1, len(job.stepped_at))
            estimator.learn(job.spec, report.plan, report.stage, report.seconds, steps=steps)
