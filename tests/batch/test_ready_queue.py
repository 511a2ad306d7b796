"""The ready queue: how many jobs may be taken up, and which are sampled together."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from i2v_core.batch.execution.ready_queue import ReadyQueue


def job(name: str) -> Any:
    return SimpleNamespace(name=name)


def taken(ready: ReadyQueue) -> int:
    """Fills the queue; how many jobs there was room for."""
    count = 0
    while ready._has_room():  # pyright: ignore[reportPrivateUsage]
        ready.wait_for_room()
        ready.push(job(f"job {count}"))
        count += 1
    return count


@pytest.mark.parametrize(("max_in_flight", "clips", "before", "beside"), [(1, 1, 1, 0), (4, 1, 2, 1), (4, 3, 6, 3)])
def test_as_many_are_encoded_ahead_as_are_sampled_together(
    max_in_flight: int, clips: int, before: int, beside: int
) -> None:
    """There are `before` jobs ready before any is sampled, and `beside` them while some are."""
    ready = ReadyQueue(max_in_flight)
    ready.set_batch_hint(clips)
    assert taken(ready) == before
    assert ready.pop() is not None
    assert len(ready.take_matching(lambda _: True, clips - 1)) == clips - 1
    assert before - clips + taken(ready) == beside


def test_matching_jobs_are_taken_in_their_order() -> None:
    ready = ReadyQueue(8)
    ready.set_batch_hint(4)
    for name in ("a1", "b1", "a2", "a3", "b2"):
        ready.wait_for_room()
        ready.push(job(name))
    first: Any = ready.pop()
    assert first.name == "a1"
    matching: list[Any] = ready.take_matching(lambda it: it.name.startswith("a"), 1)  # pyright: ignore[reportAttributeAccessIssue]
    assert [it.name for it in matching] == ["a2"]
    rest: list[Any] = [ready.pop() for _ in range(3)]
    assert [it.name for it in rest] == ["b1", "a3", "b2"]
    ready.end()
    assert ready.pop() is None


def test_a_batch_waits_for_jobs_that_are_being_encoded_and_no_longer() -> None:
    ready = ReadyQueue(8)
    ready.set_batch_hint(4)
    for _ in range(2):
        ready.wait_for_room()
    found: list[int] = []
    waiting = threading.Thread(target=lambda: found.append(ready.wait_for_matching(lambda _: True, 3)))
    waiting.start()
    ready.push(job("one"))
    ready.push(None)  # a job that has failed
    assert not found
    ready.set_idle(True)
    waiting.join(30)
    assert found == [1]
