"""A part of a queue: an engine that is given it sees one list's jobs alone, and what it does is done to the whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from i2v_core.batch.jobs.job import JobState
from i2v_core.batch.jobs.leases import LeaseManager
from i2v_core.batch.jobs.store import FilteredJobStore, JobStore

from .conftest import Clock, MakeSpec


@pytest.fixture
def part(store: JobStore, clock: Clock) -> Iterator[FilteredJobStore]:
    """A part of `store`'s queue with nothing chosen."""
    opened = FilteredJobStore(store.database.path, clock)
    yield opened
    opened.close()


def test_only_chosen_jobs_wait_and_count(store: JobStore, part: FilteredJobStore, make_spec: MakeSpec) -> None:
    ids = store.add(map(make_spec, range(4)))
    assert part.waiting() == []
    assert sum(part.counts().values()) == 0
    part.choose(ids[1:3])
    assert [row[0] for row in part.waiting()] == list(ids[1:3])
    assert part.counts()[JobState.WAITING] == 2
    assert [job.id for job in part.chosen()] == list(ids[1:3])
    assert part.chosen(JobState.DONE) == ()
    assert len(part.jobs()) == 4


def test_what_is_done_in_the_part_is_done_in_the_queue(
    store: JobStore, part: FilteredJobStore, make_spec: MakeSpec
) -> None:
    ids = part.add(map(make_spec, range(3)))
    part.choose(ids)
    part.cancel(ids[0])
    assert LeaseManager(part).claim(ids[1], "a card") is not None
    assert store.job(ids[0]).state is JobState.CANCELLED
    assert store.job(ids[1]).state is JobState.RUNNING
    assert {state: count for state, count in part.counts().items() if count} == {
        JobState.WAITING: 1,
        JobState.RUNNING: 1,
        JobState.CANCELLED: 1,
    }


def test_thousands_of_jobs_can_be_chosen(part: FilteredJobStore, make_spec: MakeSpec) -> None:
    ids = part.add(map(make_spec, range(3000)))
    part.choose(ids)
    assert len(part.waiting()) == part.counts()[JobState.WAITING] == len(part.chosen()) == 3000
