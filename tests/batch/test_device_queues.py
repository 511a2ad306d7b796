"""Jobs onto several cards: each to one that it fits, the loads even, and none lost with a card."""

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


def candidate(job: int, seconds: float, gib: float = 2.0, plan: str = "a", priority: float = 1.0) -> PendingJob:
    """The larger card is twice as fast."""
    on = {
        kind: ResourceEstimate(seconds=seconds / (2 if size > 8 else 1), peak_bytes=int(gib * GIB))
        for kind, size in KINDS.items()
        if gib <= size
    }
    return PendingJob(id=job, added_at=0.0, plan=plan, on=on, priority=priority)


def taken(shares: DeviceQueues, card: str) -> list[int]:
    jobs: list[int] = []
    while (job := shares.take(card)) is not None:
        jobs.append(job.id)
    return jobs


def test_the_longest_go_first_onto_the_card_that_is_done_first() -> None:
    shares = DeviceQueues({"a": "8 GB", "b": "8 GB"})
    assert not shares.add(candidate(job, seconds) for job, seconds in enumerate((3, 3, 2, 2, 2)))
    assert sorted(shares.load_seconds(card) for card in "ab") == [5, 7]


def test_a_fast_card_gets_more() -> None:
    shares = DeviceQueues({"slow": "8 GB", "fast": "24 GB"})
    shares.add(candidate(job, 10) for job in range(30))
    assert shares.load_seconds("slow") == shares.load_seconds("fast") == 100


def test_jobs_go_only_where_they_fit() -> None:
    shares = DeviceQueues({"small": "8 GB", "large": "24 GB"})
    nowhere = shares.add([candidate(1, 5, gib=20), candidate(2, 5, gib=30), candidate(3, 5)])
    assert [job.id for job in nowhere] == [2]
    assert taken(shares, "small") == [3]
    assert shares.take("small") is None
    assert taken(shares, "large") == [1]


@pytest.mark.parametrize(("rule", "expected"), [(Policy.WEIGHT, [2, 3, 1]), (Policy.FIRST_COME, [1, 2, 3])])
def test_a_card_takes_its_share_by_the_rule(rule: Policy, expected: list[int]) -> None:
    shares = DeviceQueues({"a": "8 GB"}, rule)
    shares.add([candidate(1, 5), candidate(2, 20, plan="b"), candidate(3, 10)])
    assert taken(shares, "a") == expected


def test_the_plan_that_ran_last_is_preferred() -> None:
    shares = DeviceQueues({"a": "8 GB"})
    shares.add([candidate(1, 11, plan="b"), candidate(2, 10, plan="a")])
    job = shares.take("a", loaded_plan="a")
    assert job is not None
    assert job.id == 2


def test_what_does_not_fit_now_is_passed_over() -> None:
    shares = DeviceQueues({"a": "8 GB"})
    shares.add([candidate(1, 50, gib=6, plan="b"), candidate(2, 5)])
    job = shares.take("a", fits=lambda it: it.plan == "a")
    assert job is not None
    assert job.id == 2
    assert 1 in shares


def test_who_has_nothing_left_takes_over_from_who_has_most() -> None:
    """As long as that is sooner than where it is."""
    shares = DeviceQueues({"a": "8 GB", "b": "8 GB"})
    shares.add([candidate(job, 10) for job in range(4)])
    assert len(taken(shares, "a")) == 3
    assert len(taken(shares, "b")) == 1


def test_a_job_that_is_done_sooner_where_it_is_stays_there() -> None:
    shares = DeviceQueues({"slow": "8 GB", "fast": "24 GB"})
    shares.add([candidate(1, 10)])
    assert shares.take("slow") is None  # the fast card has it, and needs half the time
    assert 1 in shares


def test_jobs_of_a_lost_card_move_on() -> None:
    shares = DeviceQueues({"small": "8 GB", "large": "24 GB"})
    shares.add([candidate(1, 5), candidate(2, 5, gib=20), *(candidate(job, 5) for job in range(3, 9))])
    homeless = shares.lose("large")
    assert [job.id for job in homeless] == [2]
    assert sorted(taken(shares, "small")) == [1, 3, 4, 5, 6, 7, 8]


@given(
    jobs=st.lists(st.tuples(st.floats(0.1, 1000), st.sampled_from([1.0, 6.0, 20.0, 40.0]), st.sampled_from("abc"))),
    cards=st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=5),
    moves=st.lists(st.tuples(st.sampled_from(["take", "remove", "lose"]), st.integers(0, 100)), max_size=40),
)
def test_every_job_is_run_once_on_a_card_that_it_fits_or_named(
    jobs: list[tuple[float, float, str]], cards: list[str], moves: list[tuple[str, int]]
) -> None:
    kinds = {f"card {index}": kind for index, kind in enumerate(cards)}
    shares = DeviceQueues(kinds)
    seen: Counter[int] = Counter()
    for job in shares.add(candidate(job, *of) for job, of in enumerate(jobs)):
        assert not set(job.on) & set(kinds.values())
        seen[job.id] += 1
    for move, which in moves:
        card = sorted(kinds)[which % len(kinds)]
        if move == "take" and (job := shares.take(card)) is not None:
            assert kinds[card] in job.on
            seen[job.id] += 1
        elif move == "remove" and which in shares:
            shares.remove(which)
            seen[which] += 1
        elif move == "lose" and len(kinds) > 1:
            seen.update(job.id for job in shares.lose(card))
            del kinds[card]
    for card in kinds:
        shares.is_idle(card, 0.0)
    for card in kinds:
        while (job := shares.take(card)) is not None:
            seen[job.id] += 1
    assert len(shares) == 0
    assert seen == Counter(range(len(jobs)))


def test_ten_thousand_jobs_on_64_cards_end_near_the_lower_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    simulate = importlib.import_module("queue_simulation").simulate
    row = simulate(10_000, 64, Policy.WEIGHT, seed=1)
    assert row["done"] == 10_000
    assert row["makespan_over_bound"] <= 1.1
    assert row["starved"] == 0
    assert row["wait_seconds"]["median of priority 10"] < row["wait_seconds"]["median"]
