"""A filtered store: an engine that is given it sees one list's jobs alone, and every change is made to the whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from i2v_core.batch.jobs.job import JobState
from i2v_core.batch.jobs.leases import LeaseManager
from i2v_core.batch.jobs.store import FilteredJobStore, JobStore

from .conftest import Clock, MakeSpec


@pytest.fixture
def filtered(store: JobStore, clock: Clock) -> Iterator[FilteredJobStore]:
    """`store`'s queue with nothing chosen."""
    opened = FilteredJobStore(store.database.path, clock)
    yield opened
    opened.close()


def test_only_chosen_jobs_wait_and_count(store: JobStore, filtered: FilteredJobStore, make_spec: MakeSpec) -> None:
    ids = store.add(map(make_spec, range(4)))
    assert filtered.waiting() == []
    assert filtered.queued() == ()
    assert sum(filtered.counts().values()) == 0
    filtered.choose(ids[1:3])
    assert [job.id for job in filtered.waiting()] == list(ids[1:3])
    assert [job.id for job in filtered.queued()] == list(ids[1:3])
    assert filtered.counts()[JobState.WAITING] == 2
    assert [job.id for job in filtered.chosen()] == list(ids[1:3])
    assert filtered.chosen(JobState.DONE) == ()
    assert len(filtered.jobs()) == 4


def test_changes_are_made_to_the_whole_queue(store: JobStore, filtered: FilteredJobStore, make_spec: MakeSpec) -> None:
    ids = filtered.add(map(make_spec, range(3)))
    filtered.choose(ids)
    filtered.cancel(ids[0])
    assert LeaseManager(filtered).claim(ids[1], "a card") is not None
    assert store.job(ids[0]).state is JobState.CANCELLED
    assert store.job(ids[1]).state is JobState.RUNNING
    assert {state: count for state, count in filtered.counts().items() if count} == {
        JobState.WAITING: 1,
        JobState.RUNNING: 1,
        JobState.CANCELLED: 1,
    }


def test_thousands_of_jobs_can_be_chosen(filtered: FilteredJobStore, make_spec: MakeSpec) -> None:
    ids = filtered.add(map(make_spec, range(3000)))
    filtered.choose(ids)
    assert len(filtered.waiting()) == filtered.counts()[JobState.WAITING] == len(filtered.chosen()) == 3000
