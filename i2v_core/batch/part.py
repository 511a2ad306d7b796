"""The part of a queue that one list has added, for an engine that is to run that list and no other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from .job import JobState
from .records import JobRecord, record_of
from .store import JobStore


class QueuePart(JobStore):
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
