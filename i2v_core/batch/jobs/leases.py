"""Leases on jobs, which a process renews while it lives: no job runs twice, and none is lost with its process."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from .job import JobRecord, JobState, StopRequest
from .records import job_record, stop_request
from .store import JobStore

LEASE_SECONDS = 60.0
"""How long a process may be silent before its jobs go to others."""
MAX_CRASHES = 5
"""After so many processes have died while they ran a job, it counts as failed: it may be what kills them."""
_STATES = {None: JobState.WAITING, StopRequest.PAUSE: JobState.PAUSED, StopRequest.CANCEL: JobState.CANCELLED}
"""State of a job whose run has ended, by the stop request that it had."""


def owner_name() -> str:
    """A name that no other process has: machine, process id, start time, and a random part."""
    return f"{socket.gethostname()}|{os.getpid()}|{_start_time(os.getpid())}|{secrets.token_hex(4)}"


def is_gone(owner: str) -> bool:
    """Whether an owner is known to have ended: a process of this machine that no longer exists."""
    machine, pid, start_time, *_ = owner.split("|")
    return machine == socket.gethostname() and _start_time(int(pid)) != start_time


def _start_time(pid: int) -> str:
    try:
        return f"{psutil.Process(pid).create_time():.2f}"
    except psutil.Error:
        return "ended"


class LeaseManager:
    """Claims, renews and releases jobs of a queue for one owner. Every method may be called from any thread."""

    def __init__(self, store: JobStore, owner: str | None = None, lease_seconds: float = LEASE_SECONDS) -> None:
        self.store = store
        self.owner = owner or owner_name()
        self.lease_seconds = lease_seconds

    def claim(self, job_id: int, device: str) -> JobRecord | None:
        """Lease a waiting job to this owner; None if it no longer waits, or the queue is paused."""
        if self.store.paused:
            return None
        now = self.store.clock()
        with self.store.database.transaction() as connection:
            is_claimed = connection.execute(
                "UPDATE jobs SET state = ?, owner = ?, device = ?, lease_until = ?, started_at = ?, "
                "finished_at = NULL, wish = NULL, stage = NULL, done = 0, total = 0 WHERE id = ? AND state = ?",
                (
                    JobState.RUNNING.value,
                    self.owner,
                    device,
                    now + self.lease_seconds,
                    now,
                    job_id,
                    JobState.WAITING.value,
                ),
            ).rowcount
            row = connection.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return job_record(row) if is_claimed else None

    def renew(self, progress: Mapping[int, tuple[str, int, int]] | None = None) -> dict[int, StopRequest | None]:
        """Renew all leases of this owner, and return its jobs with their stop requests. Call it well within the lease.

        Args:
            progress: by job, the stage it is in, and how many of its steps or frames are done of how many.
        """
        until = self.store.clock() + self.lease_seconds
        with self.store.database.transaction() as connection:
            connection.execute("UPDATE jobs SET lease_until = ? WHERE owner = ?", (until, self.owner))
            connection.executemany(
                "UPDATE jobs SET stage = ?, done = ?, total = ? WHERE id = ? AND owner = ?",
                [(*stage_done_total, job_id, self.owner) for job_id, stage_done_total in (progress or {}).items()],
            )
            rows = connection.execute("SELECT id, wish FROM jobs WHERE owner = ?", (self.owner,)).fetchall()
        return {row["id"]: stop_request(row) for row in rows}

    def finish(self, job_id: int, output: Path, report: Mapping[str, Any] | None, measured_bytes: int | None) -> bool:
        """Mark a job as done, whose complete output is at its final path; False if another owner has it by now."""
        return self._release(
            job_id,
            "state = ?, finished_at = ?, output = ?, report = ?, measured_bytes = ?, problem = NULL, wish = NULL",
            (JobState.DONE.value, self.store.clock(), str(output), json.dumps(report), measured_bytes),
        )

    def fail(self, job_id: int, problem: str, report: Mapping[str, Any], *, attempts: int) -> JobState | None:
        """Queue a job again, or mark it as failed once `attempts` runs have failed.

        Returns its new state; None if another owner has it by now.
        """
        with self.store.database.transaction() as connection:
            row = connection.execute(
                "SELECT attempts, wish FROM jobs WHERE id = ? AND owner = ?", (job_id, self.owner)
            ).fetchone()
            if row is None:
                return None
            failed = row["attempts"] + 1
            state = JobState.FAILED if failed >= attempts else _STATES[stop_request(row)]
            connection.execute(
                "UPDATE jobs SET state = ?, attempts = ?, finished_at = ?, problem = ?, report = ?, owner = NULL, "
                "lease_until = NULL, wish = NULL WHERE id = ?",
                (state.value, failed, self.store.clock(), problem, json.dumps(report), job_id),
            )
        return state

    def release(self, job_id: int, state: JobState = JobState.WAITING) -> bool:
        """End the lease without a result: the job waits again, or is paused or cancelled. Its checkpoint stays."""
        return self._release(job_id, "state = ?, wish = NULL", (state.value,))

    def show(self, job_id: int, *, thumbnail: Path) -> None:
        """Store the path of a picture of the job."""
        with self.store.database.transaction() as connection:
            connection.execute(
                "UPDATE jobs SET thumbnail = ? WHERE id = ? AND owner = ?", (str(thumbnail), job_id, self.owner)
            )

    def reclaim_expired(self) -> tuple[int, ...]:
        """Queue the jobs of other owners again that have ended, or been silent beyond their lease; return their ids."""
        now = self.store.clock()
        with self.store.database.transaction() as connection:
            rows = connection.execute("SELECT * FROM jobs WHERE state = ?", (JobState.RUNNING.value,)).fetchall()
            expired = [row for row in rows if row["owner"] != self.owner and self._is_expired(row, now)]
            for row in expired:
                _reclaim(connection, row, now)
        return tuple(row["id"] for row in expired)

    def _is_expired(self, row: sqlite3.Row, now: float) -> bool:
        # A lease far in the future was written when the clock was wrong.
        is_held = now < row["lease_until"] <= now + 10 * self.lease_seconds
        return not is_held or is_gone(row["owner"])

    def _release(self, job_id: int, changes: str, values: tuple[Any, ...]) -> bool:
        with self.store.database.transaction() as connection:
            return bool(
                connection.execute(
                    f"UPDATE jobs SET {changes}, owner = NULL, lease_until = NULL, crashes = 0 "
                    "WHERE id = ? AND owner = ?",
                    (*values, job_id, self.owner),
                ).rowcount
            )


def _reclaim(connection: sqlite3.Connection, row: sqlite3.Row, now: float) -> None:
    crashes = row["crashes"] + 1
    state, problem = _STATES[stop_request(row)], row["problem"]
    if crashes >= MAX_CRASHES:
        state, problem = JobState.FAILED, f"the process running it died, {crashes} times"
    connection.execute(
        "UPDATE jobs SET state = ?, crashes = ?, problem = ?, owner = NULL, lease_until = NULL, wish = NULL, "
        "finished_at = ? WHERE id = ?",
        (state.value, crashes, problem, now, row["id"]),
    )
