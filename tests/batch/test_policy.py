"""The order of jobs is what its rule says, and nothing starves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i2v_core.batch.scheduling.policy import (
    AGEING_SECONDS,
    LOADED_FACTOR,
    PendingJob,
    Policy,
    ResourceEstimate,
    explain,
    sort_key,
    weight,
    with_preference,
)
from i2v_core.units import GIB

NOW = 1_700_000_000.0


def candidate(job: int, seconds: float = 60, gib: float = 2, priority: float = 1, waited: float = 0) -> PendingJob:
    return PendingJob(
        id=job,
        added_at=NOW - waited,
        plan="a",
        on={"cpu": ResourceEstimate(seconds=seconds, peak_bytes=int(gib * GIB))},
        priority=priority,
    )


candidates = st.builds(
    candidate,
    st.integers(1, 1000),
    seconds=st.floats(0, 1e5),
    gib=st.floats(0.01, 80),
    priority=st.floats(0.1, 100),
    waited=st.floats(0, 1e6),
)


def in_order(rule: Policy, *jobs: PendingJob) -> list[int]:
    return [job.id for job in sorted(jobs, key=lambda it: sort_key(rule, it, "cpu"))]


def test_the_weight_is_seconds_by_vram_times_priority() -> None:
    assert weight(ResourceEstimate(seconds=60, peak_bytes=2 * GIB), 3) == 90
    long, short, large, urgent = (
        candidate(1, seconds=100),
        candidate(2, seconds=10),
        candidate(3, seconds=100, gib=8),
        candidate(4, seconds=10, priority=20),
    )
    assert in_order(Policy.WEIGHT, short, large, long, urgent) == [4, 1, 3, 2]
    assert in_order(Policy.FIRST_COME, short, large, long, urgent) == [1, 2, 3, 4]


def test_places_given_by_hand_come_first() -> None:
    light, heavy, other = candidate(1, seconds=1), candidate(2, seconds=1000), candidate(3, seconds=500)
    for rule in Policy:
        assert in_order(rule, heavy, replace(other, position=1), replace(light, position=0)) == [1, 3, 2]


@given(first=candidates, second=candidates, later=st.floats(0, 1e6))
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


@given(waiting=candidates, newcomer=candidates)
def test_nothing_starves(waiting: PendingJob, newcomer: PendingJob) -> None:
    """One that comes later than the bound is never before, however heavy; also if its plan is loaded."""
    ratio = LOADED_FACTOR * weight(newcomer.on["cpu"], newcomer.priority) / weight(waiting.on["cpu"], waiting.priority)
    bound_seconds = max(0.0, AGEING_SECONDS * math.log2(ratio))
    newcomer = replace(newcomer, added_at=waiting.added_at + bound_seconds + 1)
    key = with_preference(Policy.WEIGHT, sort_key(Policy.WEIGHT, newcomer, "cpu"), newcomer, newcomer.plan)
    assert sort_key(Policy.WEIGHT, waiting, "cpu") < key


def test_a_loaded_plan_is_preferred_but_not_at_any_price() -> None:
    loaded, heavier, much_heavier = (
        candidate(1, seconds=100),
        replace(candidate(2, seconds=120), plan="b"),
        replace(candidate(3, seconds=130), plan="b"),
    )

    def preferred(rule: Policy, *jobs: PendingJob) -> list[int]:
        return [
            job.id for job in sorted(jobs, key=lambda it: with_preference(rule, sort_key(rule, it, "cpu"), it, "a"))
        ]

    assert preferred(Policy.WEIGHT, heavier, loaded) == [1, 2]
    assert preferred(Policy.WEIGHT, much_heavier, loaded) == [3, 1]
    assert preferred(Policy.FIRST_COME, replace(heavier, added_at=NOW - 1), loaded) == [2, 1]


def test_an_explanation_names_the_numbers() -> None:
    job = candidate(1, seconds=60, gib=2, priority=3, waited=AGEING_SECONDS)
    words = str(explain(Policy.WEIGHT, job, "cpu", NOW, loaded_plan="a"))
    for number in ("score 225", "weight 90", "60.0 s", "2.00 GiB", "priority 3", "× 2 for 1800 s", "1.25"):
        assert number in words
    assert "first come" in str(explain(Policy.FIRST_COME, job, "cpu", NOW))
    assert "place 3 by hand" in str(explain(Policy.WEIGHT, replace(job, position=2), "cpu", NOW))


@pytest.mark.parametrize("rule", Policy)
def test_numbers_that_make_no_sense_do_not_break_the_order(rule: Policy) -> None:
    jobs = [candidate(1, seconds=0, gib=0), candidate(2, seconds=1e300), candidate(3, waited=-1e9)]
    assert sorted(in_order(rule, *jobs)) == [1, 2, 3]
    assert str(explain(rule, jobs[0], "cpu", NOW + 1e12))
