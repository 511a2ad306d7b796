"""Rows of the queue's tables as typed values."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .job import JobRecord, JobSpec, JobState, StopRequest


class WaitingJob(NamedTuple):
    """A waiting job's id, and what a user can change about it."""

    id: int
    priority: float
    position: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedJob:
    """A waiting job with all that decides its place in the order; cheap enough to read for a whole queue."""

    id: int
    spec_json: str
    """`spec_of` reads it, which takes longer than all the rest."""
    priority: float
    position: int | None
    """Place that a user has given it."""
    added_at: float
    """Seconds since the epoch."""
    predicted_seconds: float | None
    predicted_bytes: int | None


QUEUED_COLUMNS = "id, spec AS spec_json, priority, position, added_at, predicted_seconds, predicted_bytes"


def queued_job(row: sqlite3.Row) -> QueuedJob:
    """A row of `QUEUED_COLUMNS`."""
    return QueuedJob(**dict(row))


def spec_of(spec_json: str) -> JobSpec:
    """The spec that a job was added with."""
    return JobSpec.from_dict(json.loads(spec_json))


def job_record(row: sqlite3.Row) -> JobRecord:
    """A whole row of the table of jobs; its priority may have been changed since the spec was written."""
    spec = JobSpec.from_dict({**json.loads(row["spec"]), "priority": row["priority"]})
    return JobRecord(
        id=row["id"],
        spec=spec,
        state=JobState(row["state"]),
        position=row["position"],
        stop_request=stop_request(row),
        added_at=row["added_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        attempts=row["attempts"],
        crashes=row["crashes"],
        owner=row["owner"],
        device=row["device"],
        stage=row["stage"],
        done=row["done"],
        total=row["total"],
        predicted_seconds=row["predicted_seconds"],
        predicted_bytes=row["predicted_bytes"],
        measured_bytes=row["measured_bytes"],
        output=Path(row["output"]) if row["output"] else None,
        thumbnail=Path(row["thumbnail"]) if row["thumbnail"] else None,
        problem=row["problem"],
        report=json.loads(row["report"]) if row["report"] else None,
    )


def stop_request(row: sqlite3.Row) -> StopRequest | None:
    """The stop request of a row, whose column has the name that the first version gave it."""
    return StopRequest(row["wish"]) if row["wish"] else None
