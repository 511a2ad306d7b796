"""The queue on disk: adding jobs, asking for them, and steering them. Who runs jobs holds them through `claims`."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ...errors import BadInputError
from .database import Database
from .job import JobRecord, JobSpec, JobState, StopRequest, check_priority, record_of

_KEPT_TIMINGS = 20
_PAUSED = "paused"


class JobStore:
    """A queue in a SQLite file, which threads and processes may share.

    A job is in it from the moment that `add` returns, and whatever is said of it later is there after a crash.
    `clock` gives seconds since the epoch.

    Raises:
        FileError: the file cannot be used; also by every method, when the disk fails later.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.database = Database(path)
        self.clock = clock

    def close(self) -> None:
        self.database.close()

    def add(self, specs: Iterable[JobSpec]) -> tuple[int, ...]:
        """All of the jobs or none; their ids. One that is there already, whatever its state, is not added again; only
        where its picture and model now lie is taken over.
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

    def jobs(self, *states: JobState) -> tuple[JobRecord, ...]:
        """Those in the given states, or all, in the order in which they were added."""
        chosen = [state.value for state in states or JobState]
        places = ", ".join("?" * len(chosen))
        query = f"SELECT * FROM jobs WHERE state IN ({places}) ORDER BY id"
        with self.database.reading() as connection:
            rows = connection.execute(query, chosen).fetchall()
        return tuple(map(record_of, rows))

    def waiting(self) -> list[tuple[int, float, int | None]]:
        """Id, priority and position of every job that waits."""
        query = "SELECT id, priority, position FROM jobs WHERE state = ?"
        with self.database.reading() as connection:
            return [tuple(row) for row in connection.execute(query, (JobState.WAITING.value,))]

    def job(self, job_id: int) -> JobRecord:
        with self.database.reading() as connection:
            row = connection.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            raise BadInputError(f"there is no job {job_id} in the queue", "choose one from the list")
        return record_of(row)

    def counts(self) -> dict[JobState, int]:
        """How many there are in each state."""
        with self.database.reading() as connection:
            found = dict(connection.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())
        return {state: found.get(state.value, 0) for state in JobState}

    @property
    def paused(self) -> bool:
        """Whether no further jobs are to be begun."""
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
        """A job that waits is passed over; one that runs stops, and keeps its checkpoint."""
        self._steer(job_id, "paused", {JobState.WAITING: JobState.PAUSED}, StopRequest.PAUSE)

    def resume(self, job_id: int) -> None:
        self._steer(job_id, "resumed", {JobState.PAUSED: JobState.WAITING}, None)

    def cancel(self, job_id: int) -> None:
        """A job that waits will not run; one that runs stops within a chunk."""
        moves = {JobState.WAITING: JobState.CANCELLED, JobState.PAUSED: JobState.CANCELLED}
        self._steer(job_id, "cancelled", moves, StopRequest.CANCEL)

    def retry(self, job_id: int) -> None:
        """A job that is over waits again, with all of its attempts; of one that was done, only a lost video is made."""
        over = [state for state in JobState if state.is_final]
        self._steer(job_id, "tried again", dict.fromkeys(over, JobState.WAITING), None)

    def set_priority(self, job_id: int, priority: float) -> None:
        check_priority(priority)
        self.job(job_id)
        with self.database.transaction() as connection:
            connection.execute("UPDATE jobs SET priority = ? WHERE id = ?", (priority, job_id))

    def pin(self, job_ids: Sequence[int]) -> None:
        """These run first, in this order, whatever the rule says; all others by the rule again."""
        for job_id in job_ids:
            self.job(job_id)
        with self.database.transaction() as connection:
            connection.execute("UPDATE jobs SET position = NULL")
            connection.executemany(
                "UPDATE jobs SET position = ? WHERE id = ?", [(place, job_id) for place, job_id in enumerate(job_ids)]
            )

    def note_predictions(self, predicted: Sequence[tuple[int, float | None, int]]) -> None:
        """What jobs are expected to take, for those who look at the queue: id, seconds, bytes."""
        if not predicted:
            return
        with self.database.transaction() as connection:
            connection.executemany(
                "UPDATE jobs SET predicted_seconds = ?, predicted_bytes = ? WHERE id = ?",
                [(seconds, peak_bytes, job_id) for job_id, seconds, peak_bytes in predicted],
            )

    def learn(self, pairing: str, shape: str, stage: str, *, work: float, seconds: float) -> None:
        """What a stage of so much work took. `pairing` names model and device; the last few are kept of each shape."""
        with self.database.transaction() as connection:
            connection.execute(
                "INSERT INTO timings (pairing, shape, stage, work, seconds) VALUES (?, ?, ?, ?, ?)",
                (pairing, shape, stage, work, seconds),
            )
            connection.execute(
                "DELETE FROM timings WHERE pairing = ? AND shape = ? AND stage = ? AND id NOT IN (SELECT id FROM "
                "timings WHERE pairing = ? AND shape = ? AND stage = ? ORDER BY id DESC LIMIT ?)",
                (pairing, shape, stage, pairing, shape, stage, _KEPT_TIMINGS),
            )

    def seconds_per_unit(self, pairing: str, shape: str, stage: str) -> float | None:
        """The median of what was learned from this shape, or else from all of the pairing; None where nothing was."""
        query = "SELECT seconds / work FROM timings WHERE pairing = ? AND stage = ?"
        with self.database.reading() as connection:
            ratios = connection.execute(f"{query} AND shape = ?", (pairing, stage, shape)).fetchall()
            ratios = ratios or connection.execute(query, (pairing, stage)).fetchall()
        return statistics.median(row[0] for row in ratios) if ratios else None

    def _steer(self, job_id: int, word: str, moves: Mapping[JobState, JobState], wish: StopRequest | None) -> None:
        """Moves a job to another state; of one that runs it is wished.

        Raises:
            BadInputError: there is no such job, or it is in a state from which it cannot be.
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
            elif state is JobState.RUNNING and wish is not None:
                connection.execute("UPDATE jobs SET wish = ? WHERE id = ?", (wish.value, job_id))
            else:
                raise BadInputError(f"job {job_id} is {state.value} and cannot be {word}", "choose another")


class FilteredJobStore(JobStore):
    """The queue of a file, of which only some jobs wait or count; whatever is done to a job is done to the whole."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        super().__init__(path, clock)
        self._ids: frozenset[int] = frozenset()

    def choose(self, ids: Iterable[int]) -> None:
        self._ids = frozenset(ids)

    def waiting(self) -> list[tuple[int, float, int | None]]:
        return [row for row in super().waiting() if row[0] in self._ids]

    def counts(self) -> dict[JobState, int]:
        query = "SELECT state, count(*) FROM jobs WHERE id IN (SELECT value FROM json_each(?)) GROUP BY state"
        with self.database.reading() as connection:
            found = dict(connection.execute(query, (json.dumps(sorted(self._ids)),)).fetchall())
        return {state: found.get(state.value, 0) for state in JobState}

    def chosen(self, *states: JobState) -> tuple[JobRecord, ...]:
        """Those in the given states, or all, in the order in which they were added."""
        chosen = json.dumps([state.value for state in states or JobState])
        query = (
            "SELECT * FROM jobs WHERE id IN (SELECT value FROM json_each(?)) "
            "AND state IN (SELECT value FROM json_each(?)) ORDER BY id"
        )
        with self.database.reading() as connection:
            rows = connection.execute(query, (json.dumps(sorted(self._ids)), chosen)).fetchall()
        return tuple(map(record_of, rows))
