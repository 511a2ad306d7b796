"""Jobs are distributed over several devices: each to one that it fits, the loads even, none lost with a device."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i2v_core.batch.scheduling.device_queues import DeviceQueues
from i2v_core.batch.scheduling.policy import PendingJob, Policy, ResourceEstimate
from i2v_core.units import GIB

KINDS = {"8 GB": 8, "24 GB": 24}
ROOT = Path(__file__).parents[2]


def pending(job: int, seconds: float, gib: float = 2.0, plan: str = "a", priority: float = 1.0) -> PendingJob:
    """The larger device is twice as fast."""
    on = {
        kind: ResourceEstimate(seconds=seconds / (2 if size > 8 else 1), peak_bytes=int(gib * GIB))
        for kind, size in KINDS.items()
        if gib <= size
    }
    return PendingJob(id=job, added_at=0.0, plan=plan, on=on, priority=priority)


def taken(queues: DeviceQueues, device: str) -> list[int]:
    jobs: list[int] = []
    while (job := queues.take(device)) is not None:
        jobs.append(job.id)
    return jobs


def test_the_longest_go_first_onto_the_card_that_is_done_first() -> None:
    queues = DeviceQueues({"a": "8 GB", "b": "8 GB"})
    assert not queues.add(pending(job, seconds) for job, seconds in enumerate((3, 3, 2, 2, 2)))
    assert sorted(queues.load_seconds(device) for device in "ab") == [5, 7]


def test_a_fast_card_gets_more() -> None:
    queues = DeviceQueues({"slow": "8 GB", "fast": "24 GB"})
    queues.add(pending(job, 10) for job in range(30))
    assert queues.load_seconds("slow") == queues.load_seconds("fast") == 100


def test_jobs_go_only_where_they_fit() -> None:
    queues = DeviceQueues({"small": "8 GB", "large": "24 GB"})
    nowhere = queues.add([pending(1, 5, gib=20), pending(2, 5, gib=30), pending(3, 5)])
    assert [job.id for job in nowhere] == [2]
    assert taken(queues, "small") == [3]
    assert queues.take("small") is None
    assert taken(queues, "large") == [1]


@pytest.mark.parametrize(("policy", "expected"), [(Policy.WEIGHT, [2, 3, 1]), (Policy.FIRST_COME, [1, 2, 3])])
def test_a_card_takes_its_share_by_the_rule(policy: Policy, expected: list[int]) -> None:
    queues = DeviceQueues({"a": "8 GB"}, policy)
    queues.add([pending(1, 5), pending(2, 20, plan="b"), pending(3, 10)])
    assert taken(queues, "a") == expected


def test_the_plan_that_ran_last_is_preferred() -> None:
    queues = DeviceQueues({"a": "8 GB"})
    queues.add([pending(1, 11, plan="b"), pending(2, 10, plan="a")])
    job = queues.take("a", loaded_plan="a")
    assert job is not None
    assert job.id == 2


def test_what_does_not_fit_now_is_passed_over() -> None:
    queues = DeviceQueues({"a": "8 GB"})
    queues.add([pending(1, 50, gib=6, plan="b"), pending(2, 5)])
    job = queues.take("a", fits=lambda it: it.plan == "a")
    assert job is not None
    assert job.id == 2
    assert 1 in queues


def test_who_has_nothing_left_takes_over_from_who_has_most() -> None:
    """A job moves only if it ends sooner on the other device."""
    queues = DeviceQueues({"a": "8 GB", "b": "8 GB"})
    queues.add([pending(job, 10) for job in range(4)])
    assert len(taken(queues, "a")) == 3
    assert len(taken(queues, "b")) == 1


def test_a_job_that_is_done_sooner_where_it_is_stays_there() -> None:
    queues = DeviceQueues({"slow": "8 GB", "fast": "24 GB"})
    queues.add([pending(1, 10)])
    assert queues.take("slow") is None  # the fast device has it, and needs half the time
    assert 1 in queues


def test_jobs_of_a_lost_card_move_on() -> None:
    queues = DeviceQueues({"small": "8 GB", "large": "24 GB"})
    queues.add([pending(1, 5), pending(2, 5, gib=20), *(pending(job, 5) for job in range(3, 9))])
    rejected = queues.lose("large")
    assert [job.id for job in rejected] == [2]
    assert sorted(taken(queues, "small")) == [1, 3, 4, 5, 6, 7, 8]


@given(
    jobs=st.lists(st.tuples(st.floats(0.1, 1000), st.sampled_from([1.0, 6.0, 20.0, 40.0]), st.sampled_from("abc"))),
    cards=st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=5),
    moves=st.lists(st.tuples(st.sampled_from(["take", "remove", "lose"]), st.integers(0, 100)), max_size=40),
)
def test_every_job_is_run_once_on_a_card_that_it_fits_or_named(
    jobs: list[tuple[float, float, str]], cards: list[str], moves: list[tuple[str, int]]
) -> None:
    kinds = {f"device {index}": kind for index, kind in enumerate(cards)}
    queues = DeviceQueues(kinds)
    seen: Counter[int] = Counter()
    for job in queues.add(pending(job, *of) for job, of in enumerate(jobs)):
        assert not set(job.on) & set(kinds.values())
        seen[job.id] += 1
    for move, which in moves:
        device = sorted(kinds)[which % len(kinds)]
        if move == "take" and (job := queues.take(device)) is not None:
            assert kinds[device] in job.on
            seen[job.id] += 1
        elif move == "remove" and which in queues:
            queues.remove(which)
            seen[which] += 1
        elif move == "lose" and len(kinds) > 1:
            seen.update(job.id for job in queues.lose(device))
            del kinds[device]
    for device in kinds:
        queues.mark_idle(device, 0.0)
    for device in kinds:
        while (job := queues.take(device)) is not None:
            seen[job.id] += 1
    assert len(queues) == 0
    assert seen == Counter(range(len(jobs)))


def test_ten_thousand_jobs_on_64_cards_end_near_the_lower_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    simulate = importlib.import_module("queue_simulation").simulate
    row = simulate(10_000, 64, Policy.WEIGHT, seed=1)
    assert row["done"] == 10_000
    assert row["makespan_over_bound"] <= 1.1
    assert row["starved"] == 0
    assert row["wait_seconds"]["median of priority 10"] < row["wait_seconds"]["median"]
