"""The queue as people look at it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from i2v_core.batch.jobs.job import JobState
from i2v_core.batch.jobs.leases import LeaseManager
from i2v_core.batch.jobs.store import JobStore
from i2v_core.batch.scheduling.policy import AGEING_SECONDS, Policy
from i2v_core.batch.scheduling.queue_view import listing
from i2v_core.families import VideoSize

from .conftest import Clock, MakeSpec

GIB = 1 << 30


def ids_of(store: JobStore, clock: Clock, rule: Policy = Policy.WEIGHT, most: int = 100) -> list[int]:
    return [job.id for job in listing(store, rule, most, clock.now).jobs]


@pytest.mark.parametrize("rule", Policy)
def test_waiting_jobs_are_in_the_order_of_the_rule(
    store: JobStore, clock: Clock, make_spec: MakeSpec, rule: Policy
) -> None:
    ids: list[int] = []
    for seed in range(4):
        ids += store.add([make_spec(seed)])
        clock.now += 1
    store.note_predictions([(job, seconds, GIB) for job, seconds in zip(ids, (10, 40, 20, 30), strict=True)])
    orders = {Policy.WEIGHT: [1, 3, 2, 0], Policy.FIRST_COME: [0, 1, 2, 3]}
    assert ids_of(store, clock, rule) == [ids[place] for place in orders[rule]]
    store.pin([ids[2]])
    assert ids_of(store, clock, rule)[0] == ids[2]


def test_an_old_job_overtakes_and_one_of_the_loaded_plan_goes_first(
    store: JobStore, clock: Clock, make_spec: MakeSpec
) -> None:
    (old,) = store.add([make_spec(0)])
    clock.now += 1.5 * AGEING_SECONDS
    (new,) = store.add([make_spec(1)])
    store.note_predictions([(old, 10, GIB), (new, 20, GIB)])
    assert ids_of(store, clock) == [old, new]
    clock.now += 1
    other = replace(make_spec(2), size=VideoSize(width_pixels=128, height_pixels=64, frames=2))
    same, ran = store.add([other, replace(other, seed=3)])
    store.note_predictions([(same, 19, GIB)])
    assert ids_of(store, clock).index(same) > ids_of(store, clock).index(new)
    LeaseManager(store).claim(ran, "a card")
    found = listing(store, Policy.WEIGHT, 100, clock.now)
    assert [job.id for job in found.jobs] == [ran, old, same, new]
    assert "the same plan ran last" in str(found.why[same])
    assert "another plan ran last" in str(found.why[new])


def test_jobs_that_are_not_predicted_yet_come_last_and_have_no_reason(
    store: JobStore, clock: Clock, make_spec: MakeSpec
) -> None:
    ids = store.add(map(make_spec, range(3)))
    store.note_predictions([(ids[2], 10, GIB)])
    found = listing(store, Policy.WEIGHT, 100, clock.now)
    assert [job.id for job in found.jobs] == [ids[2], ids[0], ids[1]]
    assert set(found.why) == {ids[2]}
    assert found.seconds_left is None


def test_time_left_is_that_of_all_jobs_less_what_has_run(store: JobStore, clock: Clock, make_spec: MakeSpec) -> None:
    ids = store.add(map(make_spec, range(4)))
    store.note_predictions([(job, 100, GIB) for job in ids])
    claims = LeaseManager(store)
    claims.claim(ids[0], "a card")
    claims.finish(ids[0], Path("a.mp4"), None, None)
    store.pause(ids[1])
    claims.claim(ids[2], "a card")
    clock.now += 30
    assert listing(store, Policy.WEIGHT, 100, clock.now).seconds_left == 170
    clock.now += 300
    assert listing(store, Policy.WEIGHT, 100, clock.now).seconds_left == 100


def test_only_as_many_of_each_state_are_listed_the_latest_first(
    store: JobStore, clock: Clock, make_spec: MakeSpec
) -> None:
    ids = store.add(map(make_spec, range(6)))
    claims = LeaseManager(store)
    for job in ids[:3]:
        clock.now += 1
        claims.claim(job, "a card")
        claims.finish(job, Path("a.mp4"), None, None)
    found = listing(store, Policy.WEIGHT, 2, clock.now)
    assert [job.id for job in found.jobs] == [ids[3], ids[4], ids[2], ids[1]]
    assert found.counts[JobState.WAITING] == found.counts[JobState.DONE] == 3
