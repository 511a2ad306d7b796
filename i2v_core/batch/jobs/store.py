"""The queue on disk: adding jobs, querying them, steering them. Processes that run jobs hold them through `leases`."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ...errors import BadInputError
from .database import Database
from .job import JobRecord, JobSpec, JobState, StopRequest, check_priority
from .records import QUEUED_COLUMNS, QueuedJob, WaitingJob, job_record, queued_job

_MAX_TIMINGS = 20
"""Timings kept of each shape: enough for a median, few enough to follow a change."""
_PAUSED = "paused"


class JobStore:
    """A queue in a SQLite file, which threads and processes may share.

    A job is durable from the moment that `add` returns, and so is every later change to it.

        with closing(JobStore(Path("jobs.queue"))) as store:
            (job_id,) = store.add([spec])
            store.set_priority(job_id, 10)

    Args:
        clock: seconds since the epoch.

    Raises:
        FileError: the file cannot be used; also by every method, when the disk fails later.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.database = Database(path)
        self.clock = clock

    def close(self) -> None:
        self.database.close()

    def add(self, specs: Iterable[JobSpec]) -> tuple[int, ...]:
        """Add all of the jobs or none, and return their ids.

        A job that is there already, in whatever state, is not added again; only the paths of its picture and model are
        updated, which may have moved.
        """
        ids: list[int] = []
        with self.database.transaction() as connection:
            for spec in specs:
                connection.execute(
                    "INSERT INTO jobs (key, spec, priority, state, added_at) VALUES (?, ?, ?, ?, ?) "
                    "ON CONFLICT (key) DO UPDATE SET spec = excluded.spec",
                    (spec.key, json.dumps(spec.as_dict()), spec.priority, JobState.WAITING.value, self.clock()),
                )
                ids.append(connection.execute("SELECT id FROM jobs WHERE key = ?", (spec.key,)).fetchone()[0])
        return tuple(ids)

    def job(self, job_id: int) -> JobRecord:
        with self.database.reading() as connection:
            row = connection.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            raise BadInputError(f"there is no job {job_id} in the queue", "choose one from the list")
        return job_record(row)

    def jobs(self, *states: JobState) -> tuple[JobRecord, ...]:
        """Jobs in the given states, or all, in the order in which they were added."""
        chosen = [state.value for state in states or JobState]
        places = ", ".join("?" * len(chosen))
        query = f"SELECT * FROM jobs WHERE state IN ({places}) ORDER BY id"
        with self.database.reading() as connection:
            rows = connection.execute(query, chosen).fetchall()
        return tuple(map(job_record, rows))

    def records(self, ids: Sequence[int]) -> tuple[JobRecord, ...]:
        """Jobs in the order of `ids`; those that are not there are left out."""
        query = "SELECT * FROM jobs WHERE id IN (SELECT value FROM json_each(?))"
        with self.database.reading() as connection:
            rows = {row["id"]: row for row in connection.execute(query, (json.dumps(list(ids)),))}
        return tuple(job_record(rows[job_id]) for job_id in ids if job_id in rows)

    def latest(self, state: JobState, limit: int) -> tuple[JobRecord, ...]:
        """The jobs of a state that were finished, started or added last, newest first."""
        query = (
            "SELECT * FROM jobs WHERE state = ? ORDER BY coalesce(finished_at, started_at, added_at) DESC, id LIMIT ?"
        )
        with self.database.reading() as connection:
            rows = connection.execute(query, (state.value, limit)).fetchall()
        return tuple(map(job_record, rows))

    def waiting(self) -> list[WaitingJob]:
        """Every waiting job, with as little as a scheduler must compare each time it is asked."""
        query = "SELECT id, priority, position FROM jobs WHERE state = ?"
        with self.database.reading() as connection:
            return [WaitingJob(*row) for row in connection.execute(query, (JobState.WAITING.value,))]

    def queued(self) -> tuple[QueuedJob, ...]:
        """Every waiting job, with what decides its place in the order."""
        query = f"SELECT {QUEUED_COLUMNS} FROM jobs WHERE state = ?"
        with self.database.reading() as connection:
            return tuple(map(queued_job, connection.execute(query, (JobState.WAITING.value,))))

    def last_started(self, device: str | None = None) -> JobRecord | None:
        """The job that was started last, on a device or on any, whatever has become of it."""
        query = (
            "SELECT * FROM jobs WHERE started_at IS NOT NULL AND device = coalesce(?, device) "
            "ORDER BY started_at DESC LIMIT 1"
        )
        with self.database.reading() as connection:
            row = connection.execute(query, (device,)).fetchone()
        return None if row is None else job_record(row)

    def counts(self) -> dict[JobState, int]:
        """Number of jobs in each state."""
        with self.database.reading() as connection:
            found = dict(connection.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())
        return {state: found.get(state.value, 0) for state in JobState}

    def seconds_left(self, now: float) -> float | None:
        """Predicted seconds of all jobs that wait or run, one after another, less what has run.

        None while one of them has no prediction yet.
        """
        query = (
            "SELECT count(*) - count(predicted_seconds) AS unknown, coalesce(sum(max(0, predicted_seconds - "
            "CASE WHEN state = ? THEN ? - started_at ELSE 0 END)), 0) AS seconds FROM jobs WHERE state IN (?, ?)"
        )
        running, waiting = JobState.RUNNING.value, JobState.WAITING.value
        with self.database.reading() as connection:
            row = connection.execute(query, (running, now, running, waiting)).fetchone()
        return None if row["unknown"] else float(row["seconds"])

    @property
    def paused(self) -> bool:
        """Whether no further jobs may be started."""
        with self.database.reading() as connection:
            row = connection.execute("SELECT value FROM settings WHERE name = ?", (_PAUSED,)).fetchone()
        return row is not None and row[0] == "yes"

    def set_paused(self, paused: bool) -> None:
        with self.database.transaction() as connection:
            connection.execute(
                "INSERT INTO settings VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                (_PAUSED, "yes" if paused else "no"),
            )

    def pause(self, job_id: int) -> None:
        """Skip a waiting job until it is resumed; ask a running one to stop, keeping its checkpoint."""
        self._steer(job_id, "paused", {JobState.WAITING: JobState.PAUSED}, StopRequest.PAUSE)

    def resume(self, job_id: int) -> None:
        self._steer(job_id, "resumed", {JobState.PAUSED: JobState.WAITING}, None)

    def cancel(self, job_id: int) -> None:
        """Never start a waiting job; ask a running one to stop within a chunk."""
        moves = {JobState.WAITING: JobState.CANCELLED, JobState.PAUSED: JobState.CANCELLED}
        self._steer(job_id, "cancelled", moves, StopRequest.CANCEL)

    def retry(self, job_id: int) -> None:
        """Queue a finished job again, with all of its attempts; a done one is made anew only if its video is lost."""
        final = [state for state in JobState if state.is_final]
        self._steer(job_id, "retried", dict.fromkeys(final, JobState.WAITING), None)

    def set_priority(self, job_id: int, priority: float) -> None:
        check_priority(priority)
        self.job(job_id)
        with self.database.transaction() as connection:
            connection.execute("UPDATE jobs SET priority = ? WHERE id = ?", (priority, job_id))

    def pin(self, job_ids: Sequence[int]) -> None:
        """Run these first, in this order, whatever the policy says; the policy orders all others again."""
        for job_id in job_ids:
            self.job(job_id)
        with self.database.transaction() as connection:
            connection.execute("UPDATE jobs SET position = NULL")
            connection.executemany(
                "UPDATE jobs SET position = ? WHERE id = ?",
                [(position, job_id) for position, job_id in enumerate(job_ids)],
            )

    def note_predictions(self, predictions: Sequence[tuple[int, float | None, int]]) -> None:
        """Store what jobs are predicted to need, for the queue's page: id, seconds, bytes."""
        if not predictions:
            return
        with self.database.transaction() as connection:
            connection.executemany(
                "UPDATE jobs SET predicted_seconds = ?, predicted_bytes = ? WHERE id = ?",
                [(seconds, peak_bytes, job_id) for job_id, seconds, peak_bytes in predictions],
            )

    def learn(self, pairing: str, shape: str, stage: str, *, work: float, seconds: float) -> None:
        """Store how long a stage took for an amount of work.

        Args:
            pairing: names model and device.
            shape: names jobs that run alike; the last few timings of each are kept.
        """
        with self.database.transaction() as connection:
            connection.execute(
                "INSERT INTO timings (pairing, shape, stage, work, seconds) VALUES (?, ?, ?, ?, ?)",
                (pairing, shape, stage, work, seconds),
            )
            connection.execute(
                "DELETE FROM timings WHERE pairing = ? AND shape = ? AND stage = ? AND id NOT IN (SELECT id FROM "
                "timings WHERE pairing = ? AND shape = ? AND stage = ? ORDER BY id DESC LIMIT ?)",
                (pairing, shape, stage, pairing, shape, stage, _MAX_TIMINGS),
            )

    def seconds_per_unit(self, pairing: str, shape: str, stage: str) -> float | None:
        """Median seconds for a unit of work, of this shape, or else of the whole pairing; None without any timing."""
        query = "SELECT seconds / work FROM timings WHERE pairing = ? AND stage = ?"
        with self.database.reading() as connection:
            ratios = connection.execute(f"{query} AND shape = ?", (pairing, stage, shape)).fetchall()
            ratios = ratios or connection.execute(query, (pairing, stage)).fetchall()
        return statistics.median(row[0] for row in ratios) if ratios else None

    def _steer(
        self, job_id: int, past_tense: str, moves: Mapping[JobState, JobState], stop_request: StopRequest | None
    ) -> None:
        """Move a job to another state, or leave a stop request for the owner of a running one.

        Raises:
            BadInputError: there is no such job, or its state allows no such move.
        """
        with self.database.transaction() as connection:
            row = connection.execute("SELECT state FROM jobs WHERE id = ?", (job_id,)).fetchone()
            if row is None:
                raise BadInputError(f"there is no job {job_id} in the queue", "choose one from the list")
            state = JobState(row[0])
            if state in moves:
                connection.execute(
                    "UPDATE jobs SET state = ?, wish = NULL, attempts = 0, crashes = 0 WHERE id = ?",
                    (moves[state].value, job_id),
                )
            elif state is JobState.RUNNING and stop_request is not None:
                connection.execute("UPDATE jobs SET wish = ? WHERE id = ?", (stop_request.value, job_id))
            else:
                raise BadInputError(
                    f"job {job_id} is {state.value} and cannot be {past_tense}", "choose another job or action"
                )


class FilteredJobStore(JobStore):
    """A queue of which only chosen jobs wait and count; every change is made to the whole queue."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        super().__init__(path, clock)
        self._ids: frozenset[int] = frozenset()

    def choose(self, ids: Iterable[int]) -> None:
        self._ids = frozenset(ids)

    def chosen(self, *states: JobState) -> tuple[JobRecord, ...]:
        """Chosen jobs in the given states, or all, in the order in which they were added."""
        chosen = json.dumps([state.value for state in states or JobState])
        query = (
            "SELECT * FROM jobs WHERE id IN (SELECT value FROM json_each(?)) "
            "AND state IN (SELECT value FROM json_each(?)) ORDER BY id"
        )
        with self.database.reading() as connection:
            rows = connection.execute(query, (json.dumps(sorted(self._ids)), chosen)).fetchall()
        return tuple(map(job_record, rows))

    def waiting(self) -> list[WaitingJob]:
        return [job for job in super().waiting() if job.id in self._ids]

    def queued(self) -> tuple[QueuedJob, ...]:
        return tuple(job for job in super().queued() if job.id in self._ids)

    def counts(self) -> dict[JobState, int]:
        query = "SELECT state, count(*) FROM jobs WHERE id IN (SELECT value FROM json_each(?)) GROUP BY state"
        with self.database.reading() as connection:
            found = dict(connection.execute(query, (json.dumps(sorted(self._ids)),)).fetchall())
        return {state: found.get(state.value, 0) for state in JobState}
