"""The queue as people look at it: the first jobs of each state, those that wait in the order in which they will run.

However long the queue is, only the jobs that are listed are read whole.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...words import Message
from ..jobs.job import JobRecord, JobState, record_of
from ..jobs.store import JobStore
from .estimator import plan_key
from .policy import PendingJob, Policy, ResourceEstimate, SortKey, explain, sort_key, with_preference

_SECTIONS = (
    JobState.RUNNING,
    JobState.WAITING,
    JobState.PAUSED,
    JobState.FAILED,
    JobState.CANCELLED,
    JobState.DONE,
)
_CARD = "a card"
"""The kind of card by whose predictions jobs are compared: what the store has of them is of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """`seconds_left` is for all jobs one after another; None while one of them is not predicted yet. `why` says of jobs
    that wait, and are predicted, why they have their place.
    """

    counts: Mapping[JobState, int]
    seconds_left: float | None
    jobs: tuple[JobRecord, ...]
    why: Mapping[int, Message]


def listing(store: JobStore, rule: Policy, most: int, now: float) -> Listing:
    """At most so many jobs of each state: those that wait by the rule, others the latest first."""
    loaded_plan = _last_plan(store)
    waiting = _by_place(_first_waiting(store, rule, most), rule, loaded_plan)
    sections = [waiting if state is JobState.WAITING else _latest(store, state, most) for state in _SECTIONS]
    counts = store.counts()
    candidates = {it.id: _candidate(it) for it in waiting}
    return Listing(
        counts={state: counts[state] for state in _SECTIONS},
        seconds_left=_seconds_left(store, now),
        jobs=tuple(record for section in sections for record in section),
        why={id: explain(rule, it, _CARD, now, loaded_plan).words for id, it in candidates.items() if it is not None},
    )


def _first_waiting(store: JobStore, rule: Policy, most: int) -> list[JobRecord]:
    """The first by the rule, whatever plan ran last."""
    query = "SELECT id, priority, position, added_at, predicted_seconds, predicted_bytes FROM jobs WHERE state = ?"
    with store.database.reading() as connection:
        rows = connection.execute(query, (JobState.WAITING.value,)).fetchall()
        first = sorted(rows, key=lambda row: _row_key(rule, row))[:most]
        found = connection.execute(
            "SELECT * FROM jobs WHERE id IN (SELECT value FROM json_each(?))", (json.dumps([it["id"] for it in first]),)
        ).fetchall()
    return [record_of(row) for row in found]


def _by_place(records: Iterable[JobRecord], rule: Policy, loaded_plan: str | None) -> list[JobRecord]:
    def key(record: JobRecord) -> SortKey:
        job = _candidate(record)
        if job is None:
            return _unpredicted(record.position, record.added_at, record.id)
        return with_preference(rule, sort_key(rule, job, _CARD), job, loaded_plan)

    return sorted(records, key=key)


def _row_key(rule: Policy, row: sqlite3.Row) -> SortKey:
    if row["predicted_seconds"] is None or row["predicted_bytes"] is None:
        return _unpredicted(row["position"], row["added_at"], row["id"])
    job = PendingJob(
        id=row["id"],
        added_at=row["added_at"],
        plan="",
        on={_CARD: ResourceEstimate(seconds=row["predicted_seconds"], peak_bytes=row["predicted_bytes"])},
        priority=row["priority"],
        position=row["position"],
    )
    return sort_key(rule, job, _CARD)


def _unpredicted(position: int | None, added_at: float, job_id: int) -> SortKey:
    """After all that are predicted, as they were added."""
    return (math.inf if position is None else position, math.inf, added_at, job_id)


def _candidate(record: JobRecord) -> PendingJob | None:
    """None until the job is predicted."""
    if record.predicted_seconds is None or record.predicted_bytes is None:
        return None
    return PendingJob(
        id=record.id,
        added_at=record.added_at,
        plan=plan_key(record.spec),
        on={_CARD: ResourceEstimate(seconds=record.predicted_seconds, peak_bytes=record.predicted_bytes)},
        priority=record.spec.priority,
        position=record.position,
    )


def _latest(store: JobStore, state: JobState, most: int) -> list[JobRecord]:
    query = "SELECT * FROM jobs WHERE state = ? ORDER BY coalesce(finished_at, started_at, added_at) DESC, id LIMIT ?"
    with store.database.reading() as connection:
        rows = connection.execute(query, (state.value, most)).fetchall()
    return [record_of(row) for row in rows]


def _last_plan(store: JobStore) -> str | None:
    """Of the job that was taken up last."""
    query = "SELECT * FROM jobs WHERE started_at IS NOT NULL ORDER BY started_at DESC LIMIT 1"
    with store.database.reading() as connection:
        row = connection.execute(query).fetchone()
    return None if row is None else plan_key(record_of(row).spec)


def _seconds_left(store: JobStore, now: float) -> float | None:
    query = (
        "SELECT count(*) - count(predicted_seconds) AS unknown, coalesce(sum(max(0, predicted_seconds - "
        "CASE WHEN state = ? THEN ? - started_at ELSE 0 END)), 0) AS seconds FROM jobs WHERE state IN (?, ?)"
    )
    running, waiting = JobState.RUNNING.value, JobState.WAITING.value
    with store.database.reading() as connection:
        row = connection.execute(query, (running, now, running, waiting)).fetchone()
    return None if row["unknown"] else float(row["seconds"])
