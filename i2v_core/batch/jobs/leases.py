"""Holding jobs: leases that a process renews while it lives, so that no job runs twice and none is lost with it."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sqlite3
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import psutil

from .job import JobRecord, JobState, StopRequest, record_of
from .store import JobStore

LEASE_SECONDS = 60.0
"""How long a process may be silent before its jobs go to others."""
MOST_CRASHES = 5
"""After so many processes have ended while they ran a job, it counts as failed: it may be what ends them."""
_WISHED = {StopRequest.PAUSE.value: JobState.PAUSED.value, StopRequest.CANCEL.value: JobState.CANCELLED.value}


def owner_name() -> str:
    """A name for this process that no other has: its machine, number, start, and a random part."""
    return f"{socket.gethostname()}|{os.getpid()}|{_started(os.getpid())}|{secrets.token_hex(4)}"


def is_gone(owner: str) -> bool:
    """Whether an owner is known to have ended: a process of this machine that is there no more."""
    machine, pid, started, *_ = owner.split("|")
    return machine == socket.gethostname() and _started(int(pid)) != started


def _started(pid: int) -> str:
    try:
        return f"{psutil.Process(pid).create_time():.2f}"
    except psutil.Error:
        return "ended"


class LeaseManager:
    """The jobs that one owner holds in a queue. Every method may be called from any thread."""

    def __init__(self, store: JobStore, owner: str | None = None, lease_seconds: float = LEASE_SECONDS) -> None:
        self.store = store
        self.owner = owner or owner_name()
        self.lease_seconds = lease_seconds

    def claim(self, job_id: int, device: str) -> JobRecord | None:
        """The job, now this owner's; None where it waits no more, or the queue is paused."""
        if self.store.paused:
            return None
        now = self.store.clock()
        with self.store.database.transaction() as connection:
            taken = connection.execute(
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
        return record_of(row) if taken else None

    def renew(self, progress: Mapping[int, tuple[str, int, int]] | None = None) -> dict[int, StopRequest | None]:
        """Every job that is still this owner's, with what is wished of it. To be called well within the lease.

        Args:
            progress: by job, the stage it is in, and how much of it is done of how much.
        """
        until = self.store.clock() + self.lease_seconds
        with self.store.database.transaction() as connection:
            connection.execute("UPDATE jobs SET lease_until = ? WHERE owner = ?", (until, self.owner))
            connection.executemany(
                "UPDATE jobs SET stage = ?, done = ?, total = ? WHERE id = ? AND owner = ?",
                [(*at, job_id, self.owner) for job_id, at in (progress or {}).items()],
            )
            rows = connection.execute("SELECT id, wish FROM jobs WHERE owner = ?", (self.owner,)).fetchall()
        return {row["id"]: StopRequest(row["wish"]) if row["wish"] else None for row in rows}

    def finish(self, job_id: int, output: Path, report: Mapping[str, Any] | None, measured_bytes: int | None) -> bool:
        """Done: the output is whole under its name. False where the job is another's by now."""
        return self._let_go(
            job_id,
            "state = ?, finished_at = ?, output = ?, report = ?, measured_bytes = ?, problem = NULL, wish = NULL",
            (JobState.DONE.value, self.store.clock(), str(output), json.dumps(report), measured_bytes),
        )

    def fail(self, job_id: int, problem: str, report: Mapping[str, Any], *, attempts: int) -> JobState | None:
        """Set aside with its report when `attempts` have failed, else to wait again; its state then, None where the job
        is another's by now.
        """
        with self.store.database.transaction() as connection:
            row = connection.execute(
                "SELECT attempts, wish FROM jobs WHERE id = ? AND owner = ?", (job_id, self.owner)
            ).fetchone()
            if row is None:
                return None
            failed = row["attempts"] + 1
            state = (
                JobState.FAILED if failed >= attempts else JobState(_WISHED.get(row["wish"], JobState.WAITING.value))
            )
            connection.execute(
                "UPDATE jobs SET state = ?, attempts = ?, finished_at = ?, problem = ?, report = ?, owner = NULL, "
                "lease_until = NULL, wish = NULL WHERE id = ?",
                (state.value, failed, self.store.clock(), problem, json.dumps(report), job_id),
            )
        return state

    def release(self, job_id: int, state: JobState = JobState.WAITING) -> bool:
        """As it was before it was claimed, or paused or cancelled; what is kept of its work stays."""
        return self._let_go(job_id, "state = ?, wish = NULL", (state.value,))

    def show(self, job_id: int, *, thumbnail: Path) -> None:
        with self.store.database.transaction() as connection:
            connection.execute(
                "UPDATE jobs SET thumbnail = ? WHERE id = ? AND owner = ?", (str(thumbnail), job_id, self.owner)
            )

    def reclaim_expired(self, but: Collection[str] = ()) -> tuple[int, ...]:
        """Jobs whose owner is known to have ended, or has been silent beyond its lease, wait again; their ids.

        Args:
            but: owners that are known to live.
        """
        now = self.store.clock()
        with self.store.database.transaction() as connection:
            rows = connection.execute("SELECT * FROM jobs WHERE state = ?", (JobState.RUNNING.value,)).fetchall()
            dead = [row for row in rows if row["owner"] not in {self.owner, *but} and self._is_dead(row, now)]
            for row in dead:
                _take_from_dead(connection, row, now)
        return tuple(row["id"] for row in dead)

    def _is_dead(self, row: sqlite3.Row, now: float) -> bool:
        # A lease far in the future is of a clock that was wrong.
        held = now < row["lease_until"] <= now + 10 * self.lease_seconds
        return not held or is_gone(row["owner"])

    def _let_go(self, job_id: int, changes: str, values: tuple[Any, ...]) -> bool:
        with self.store.database.transaction() as connection:
            return bool(
                connection.execute(
                    f"UPDATE jobs SET {changes}, owner = NULL, lease_until = NULL, crashes = 0 "
                    "WHERE id = ? AND owner = ?",
                    (*values, job_id, self.owner),
                ).rowcount
            )


def _take_from_dead(connection: sqlite3.Connection, row: sqlite3.Row, now: float) -> None:
    crashes = row["crashes"] + 1
    state, problem = _WISHED.get(row["wish"], JobState.WAITING.value), row["problem"]
    if crashes >= MOST_CRASHES:
        state, problem = JobState.FAILED.value, f"the process that ran it ended in the middle, {crashes} times"
    connection.execute(
        "UPDATE jobs SET state = ?, crashes = ?, problem = ?, owner = NULL, lease_until = NULL, wish = NULL, "
        "finished_at = ? WHERE id = ?",
        (state, crashes, problem, now, row["id"]),
    )
