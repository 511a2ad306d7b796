"""The queue as people look at it: its order is the one in which jobs are run."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from i2v_core.batch.devices.admission import AdmissionController
from i2v_core.batch.jobs.job import JobState
from i2v_core.batch.jobs.leases import LeaseManager
from i2v_core.batch.jobs.store import JobStore
from i2v_core.batch.monitoring.messages import score_message
from i2v_core.batch.scheduling.policy import AGEING_SECONDS, LOADED_FACTOR, Policy
from i2v_core.batch.scheduling.queue_view import view_queue
from i2v_core.batch.scheduling.scheduler import Assignment, Scheduler
from i2v_core.families import I2VModel, VideoSize

from .conftest import Clock, EmulatedDevice, MakeJob, MakeSpec, SharedCard

GIB = 1 << 30


def ids_of(store: JobStore, clock: Clock, policy: Policy = Policy.WEIGHT, limit: int = 100) -> list[int]:
    return [job.id for job in view_queue(store, policy, limit, clock.now).jobs]


@pytest.mark.parametrize("policy", Policy)
def test_waiting_jobs_are_in_the_order_of_the_rule(
    store: JobStore, clock: Clock, make_spec: MakeSpec, policy: Policy
) -> None:
    ids: list[int] = []
    for seed in range(4):
        ids += store.add([make_spec(seed)])
        clock.now += 1
    store.note_predictions([(job, seconds, GIB) for job, seconds in zip(ids, (10, 40, 20, 30), strict=True)])
    orders = {Policy.WEIGHT: [1, 3, 2, 0], Policy.FIRST_COME: [0, 1, 2, 3]}
    assert ids_of(store, clock, policy) == [ids[place] for place in orders[policy]]
    store.pin([ids[2]])
    assert ids_of(store, clock, policy)[0] == ids[2]


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
    view = view_queue(store, Policy.WEIGHT, 100, clock.now)
    # Once the old one has run, its own plan is the loaded one, which is that of the new one too.
    assert [job.id for job in view.jobs] == [ran, old, new, same]
    assert [view.scores[job].loaded for job in (old, new, same)] == [1, LOADED_FACTOR, 1]
    store.pin([same])
    view = view_queue(store, Policy.WEIGHT, 100, clock.now)
    assert [job.id for job in view.jobs] == [ran, same, old, new]
    assert view.scores[same].loaded == LOADED_FACTOR
    assert "moved to position 1 by hand" in str(score_message(view.scores[same]))
    assert "another plan ran last" in str(score_message(view.scores[old]))
    assert "the same plan ran last" in str(score_message(view.scores[new]))


def test_jobs_that_are_not_predicted_yet_come_last_and_have_no_reason(
    store: JobStore, clock: Clock, make_spec: MakeSpec
) -> None:
    ids = store.add(map(make_spec, range(3)))
    store.note_predictions([(ids[2], 10, GIB)])
    view = view_queue(store, Policy.WEIGHT, 100, clock.now)
    assert [job.id for job in view.jobs] == [ids[2], ids[0], ids[1]]
    assert set(view.scores) == {ids[2]}
    assert view.seconds_left is None


def test_time_left_is_that_of_all_jobs_less_what_has_run(store: JobStore, clock: Clock, make_spec: MakeSpec) -> None:
    ids = store.add(map(make_spec, range(4)))
    store.note_predictions([(job, 100, GIB) for job in ids])
    leases = LeaseManager(store)
    leases.claim(ids[0], "a card")
    leases.finish(ids[0], Path("a.mp4"), None, None)
    store.pause(ids[1])
    leases.claim(ids[2], "a card")
    clock.now += 30
    assert view_queue(store, Policy.WEIGHT, 100, clock.now).seconds_left == 170
    clock.now += 300
    assert view_queue(store, Policy.WEIGHT, 100, clock.now).seconds_left == 100


def test_only_as_many_of_each_state_are_listed_the_latest_first(
    store: JobStore, clock: Clock, make_spec: MakeSpec
) -> None:
    ids = store.add(map(make_spec, range(6)))
    leases = LeaseManager(store)
    for job in ids[:3]:
        clock.now += 1
        leases.claim(job, "a card")
        leases.finish(job, Path("a.mp4"), None, None)
    view = view_queue(store, Policy.WEIGHT, 2, clock.now)
    assert [job.id for job in view.jobs] == [ids[3], ids[4], ids[2], ids[1]]
    assert view.counts[JobState.WAITING] == view.counts[JobState.DONE] == 3


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("seed", range(4))
def test_the_order_that_is_shown_is_the_order_in_which_a_device_takes_the_jobs(
    store: JobStore, clock: Clock, make_job: MakeJob, tiny_model: I2VModel, policy: Policy, seed: int
) -> None:
    """Random jobs of three plans, some pinned; what ran before the engine was started counts as well."""
    rng = random.Random(seed)
    device = EmulatedDevice(card=SharedCard(1 << 40))
    sizes = [VideoSize(width_pixels=64 * width, height_pixels=64, frames=2) for width in (1, 2, 3)]
    ids: list[int] = []
    for job in range(40):
        clock.now += rng.expovariate(1 / 300)
        size, steps = rng.choice(sizes), rng.choice((1, 2, 3, 4))
        ids += store.add([make_job(job, size=size, steps=steps, priority=rng.choice((0.5, 1.0, 1.0, 2.0)))])
    store.pin(rng.sample(ids, 3))

    def scheduler() -> Scheduler:
        leases, admissions = LeaseManager(store), {device.name: AdmissionController(device.room)}
        return Scheduler(leases, {device.name: device}, admissions, policy, lambda _: tiny_model.architecture)

    def take(from_scheduler: Scheduler) -> int | None:
        clock.now += 1
        taken = from_scheduler.next(device.name)
        assert taken is None or isinstance(taken, Assignment)
        return None if taken is None else taken.record.id

    first = scheduler()
    assert take(first) is not None  # which predicts all of them
    take(first)
    anew = scheduler()
    shown = [job.id for job in view_queue(store, policy, 100, clock.now).jobs if job.state is JobState.WAITING]
    few = [job.id for job in view_queue(store, policy, 5, clock.now).jobs if job.state is JobState.WAITING]
    taken = list(iter(lambda: take(anew), None))
    assert shown == taken
    assert few == taken[:5]
    assert len(taken) == 38


def test_a_long_queue_is_listed_in_a_moment(store: JobStore, clock: Clock, make_spec: MakeSpec) -> None:
    specs = [replace(make_spec(seed), steps=1 + seed % 50, cfg=1.0 + seed % 2) for seed in range(5000)]
    ids = store.add(specs)
    store.note_predictions([(job, 1.0 + job % 97, GIB) for job in ids])
    view_queue(store, Policy.WEIGHT, 100, clock.now)  # which reads every spec once
    began = time.perf_counter()
    view = view_queue(store, Policy.WEIGHT, 100, clock.now)
    assert time.perf_counter() - began < 1.0
    assert len(view.jobs) == 100
