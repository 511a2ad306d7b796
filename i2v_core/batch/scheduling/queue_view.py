"""The queue as people look at it: the first jobs of each state, waiting ones in the order in which they will run.

However long the queue is, only the jobs that are listed are read whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from ..jobs.job import JobRecord, JobState
from ..jobs.records import QueuedJob, spec_of
from ..jobs.store import JobStore
from .estimator import plan_key
from .policy import PendingJob, Policy, ResourceEstimate, ScoreBreakdown, explain, run_order

_SECTIONS = (
    JobState.RUNNING,
    JobState.WAITING,
    JobState.PAUSED,
    JobState.FAILED,
    JobState.CANCELLED,
    JobState.DONE,
)
_KIND = "any"
"""Kind of device that jobs are compared on: the store has one prediction of each job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueView:
    """A queue as the page shows it."""

    counts: Mapping[JobState, int]
    seconds_left: float | None
    """Predicted seconds of all jobs, one after another; None while one has no prediction yet."""
    jobs: tuple[JobRecord, ...]
    scores: Mapping[int, ScoreBreakdown]
    """Why the waiting jobs have their places, by id, as far as they are predicted."""


def view_queue(store: JobStore, policy: Policy, limit: int, now: float) -> QueueView:
    """Read at most `limit` jobs of each state: waiting ones in the order of the policy, others newest first."""
    last = store.last_started()
    loaded_plan = None if last is None else plan_key(last.spec)
    order = list(islice(run_order(map(_pending_job, store.queued()), policy, _KIND, loaded_plan), limit))
    waiting = store.records([job.id for job, _ in order])
    sections = [waiting if state is JobState.WAITING else store.latest(state, limit) for state in _SECTIONS]
    counts = store.counts()
    return QueueView(
        counts={state: counts[state] for state in _SECTIONS},
        seconds_left=store.seconds_left(now),
        jobs=tuple(record for section in sections for record in section),
        scores={job.id: explain(policy, job, _KIND, now, loaded) for job, loaded in order if _KIND in job.on},
    )


def _pending_job(job: QueuedJob) -> PendingJob:
    on: dict[str, ResourceEstimate] = {}
    if job.predicted_seconds is not None and job.predicted_bytes is not None:
        on[_KIND] = ResourceEstimate(seconds=job.predicted_seconds, peak_bytes=job.predicted_bytes)
    return PendingJob(
        id=job.id,
        added_at=job.added_at,
        plan=_plan_of(job.spec_json),
        on=on,
        priority=job.priority,
        position=job.position,
    )


# A page looks again every few seconds, and reading ten thousand specs each time would take most of one.
@lru_cache(maxsize=32_768)
def _plan_of(spec_json: str) -> str:
    return plan_key(spec_of(spec_json))
