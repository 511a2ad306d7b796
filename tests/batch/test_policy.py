"""The order of jobs is what its policy says, and nothing starves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i2v_core.batch.monitoring.messages import score_message
from i2v_core.batch.scheduling.policy import (
    AGEING_SECONDS,
    LOADED_FACTOR,
    PendingJob,
    Policy,
    PolicyQueue,
    ResourceEstimate,
    explain,
    run_order,
    sort_key,
    weight,
)
from i2v_core.units import GIB

NOW = 1_700_000_000.0


def pending(job: int, seconds: float = 60, gib: float = 2, priority: float = 1, waited: float = 0) -> PendingJob:
    return PendingJob(
        id=job,
        added_at=NOW - waited,
        plan="a",
        on={"cpu": ResourceEstimate(seconds=seconds, peak_bytes=int(gib * GIB))},
        priority=priority,
    )


pending_jobs = st.builds(
    pending,
    st.integers(1, 1000),
    seconds=st.floats(0, 1e5),
    gib=st.floats(0.01, 80),
    priority=st.floats(0.1, 100),
    waited=st.floats(0, 1e6),
)


def in_order(policy: Policy, *jobs: PendingJob) -> list[int]:
    return [job.id for job in sorted(jobs, key=lambda it: sort_key(policy, it, "cpu"))]


def test_the_weight_is_seconds_by_vram_times_priority() -> None:
    assert weight(ResourceEstimate(seconds=60, peak_bytes=2 * GIB), 3) == 90
    long, short, large, urgent = (
        pending(1, seconds=100),
        pending(2, seconds=10),
        pending(3, seconds=100, gib=8),
        pending(4, seconds=10, priority=20),
    )
    assert in_order(Policy.WEIGHT, short, large, long, urgent) == [4, 1, 3, 2]
    assert in_order(Policy.FIRST_COME, short, large, long, urgent) == [1, 2, 3, 4]


def test_places_given_by_hand_come_first() -> None:
    light, heavy, other = pending(1, seconds=1), pending(2, seconds=1000), pending(3, seconds=500)
    for policy in Policy:
        assert in_order(policy, heavy, replace(other, position=1), replace(light, position=0)) == [1, 3, 2]


@given(first=pending_jobs, second=pending_jobs, later=st.floats(0, 1e6))
def test_the_order_is_that_of_the_scores_that_are_shown_and_stays(
    first: PendingJob, second: PendingJob, later: float
) -> None:
    scores = [math.log2(explain(Policy.WEIGHT, it, "cpu", NOW).score) for it in (first, second)]
    keys = [sort_key(Policy.WEIGHT, it, "cpu") for it in (first, second)]
    if abs(scores[0] - scores[1]) > 1e-6:
        assert (scores[0] > scores[1]) == (keys[0] < keys[1])
    afterwards = [explain(Policy.WEIGHT, it, "cpu", NOW + later).score for it in (first, second)]
    if all(math.isfinite(score) and score < 2**900 for score in afterwards) and abs(scores[0] - scores[1]) > 1e-6:
        assert (afterwards[0] > afterwards[1]) == (keys[0] < keys[1])


@given(waiting=pending_jobs, newcomer=pending_jobs)
def test_nothing_starves(waiting: PendingJob, newcomer: PendingJob) -> None:
    """One that comes later than the bound is never before, however heavy; also if its plan is loaded."""
    ratio = LOADED_FACTOR * weight(newcomer.on["cpu"], newcomer.priority) / weight(waiting.on["cpu"], waiting.priority)
    bound_seconds = max(0.0, AGEING_SECONDS * math.log2(ratio))
    newcomer = replace(newcomer, added_at=waiting.added_at + bound_seconds + 1)
    assert sort_key(Policy.WEIGHT, waiting, "cpu") < sort_key(Policy.WEIGHT, newcomer, "cpu", newcomer.plan)


def test_a_loaded_plan_is_preferred_but_not_at_any_price() -> None:
    loaded, heavier, much_heavier = (
        pending(1, seconds=100),
        replace(pending(2, seconds=120), plan="b"),
        replace(pending(3, seconds=130), plan="b"),
    )

    def preferred(policy: Policy, *jobs: PendingJob) -> list[int]:
        return [job.id for job in sorted(jobs, key=lambda it: sort_key(policy, it, "cpu", "a"))]

    assert preferred(Policy.WEIGHT, heavier, loaded) == [1, 2]
    assert preferred(Policy.WEIGHT, much_heavier, loaded) == [3, 1]
    assert preferred(Policy.FIRST_COME, replace(heavier, added_at=NOW - 1), loaded) == [2, 1]


def test_an_explanation_names_the_numbers() -> None:
    job = pending(1, seconds=60, gib=2, priority=3, waited=AGEING_SECONDS)
    words = str(score_message(explain(Policy.WEIGHT, job, "cpu", NOW, loaded_plan="a")))
    for number in ("score 225", "weight 90", "60.0 s", "2.00 GiB", "priority 3", "× 2 (waited 1800 s)", "1.25"):
        assert number in words
    assert "first come" in str(score_message(explain(Policy.FIRST_COME, job, "cpu", NOW)))
    assert "position 3 by hand" in str(score_message(explain(Policy.WEIGHT, replace(job, position=2), "cpu", NOW)))


@pytest.mark.parametrize("policy", Policy)
def test_numbers_that_make_no_sense_do_not_break_the_order(policy: Policy) -> None:
    jobs = [pending(1, seconds=0, gib=0), pending(2, seconds=1e300), pending(3, waited=-1e9)]
    assert sorted(in_order(policy, *jobs)) == [1, 2, 3]
    assert str(score_message(explain(policy, jobs[0], "cpu", NOW + 1e12)))


@given(
    jobs=st.lists(st.tuples(pending_jobs, st.sampled_from("abc"), st.none() | st.integers(0, 9)), max_size=30),
    loaded_plan=st.sampled_from([None, "a", "b"]),
    policy=st.sampled_from(Policy),
)
def test_each_job_in_the_run_order_is_the_first_of_those_that_are_left(
    jobs: list[tuple[PendingJob, str, int | None]], loaded_plan: str | None, policy: Policy
) -> None:
    left = {
        job_id: replace(job, id=job_id, plan=plan, position=position)
        for job_id, (job, plan, position) in enumerate(jobs)
    }
    for job, loaded in run_order(list(left.values()), policy, "cpu", loaded_plan):
        assert loaded == loaded_plan
        assert job == min(left.values(), key=lambda it: sort_key(policy, it, "cpu", loaded_plan))
        loaded_plan = left.pop(job.id).plan
    assert not left


def test_a_queue_passes_over_what_does_not_fit_and_forgets_what_is_removed() -> None:
    queue = PolicyQueue(Policy.WEIGHT, "cpu")
    heavy, light = pending(1, seconds=100), replace(pending(2, seconds=50), plan="b")
    for job in (heavy, light):
        queue.add(job)
    assert queue.next() is heavy
    assert queue.next(fits=lambda job: job.plan == "b") is light
    queue.remove(heavy.id)
    assert queue.next() is light
    queue.add(replace(heavy, priority=0.1))
    assert queue.next() is light
    assert {job.id for job in queue.jobs} == {1, 2}


def test_a_job_without_an_estimate_comes_last_by_weight_and_in_its_turn_when_first_come() -> None:
    unknown = replace(pending(1, waited=60), on={})
    assert in_order(Policy.WEIGHT, unknown, pending(2), pending(3, seconds=0)) == [2, 3, 1]
    assert in_order(Policy.FIRST_COME, unknown, pending(2), pending(3)) == [1, 2, 3]
    assert in_order(Policy.WEIGHT, replace(unknown, position=0), pending(2)) == [1, 2]
