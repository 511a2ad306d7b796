"""From the queue to sampling: how many jobs may be taken, and which go together."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from i2v_core.batch.execution.ready_queue import ReadyQueue


def job(name: str) -> Any:
    return SimpleNamespace(name=name)


def taken(line: ReadyQueue) -> int:
    """How many may be taken until there is no room: they are in the line then."""
    count = 0
    while line._has_room():  # pyright: ignore[reportPrivateUsage]
        line.wait_for_room()
        line.push(job(f"job {count}"))
        count += 1
    return count


@pytest.mark.parametrize(("max_in_flight", "clips", "before", "beside"), [(1, 1, 1, 0), (4, 1, 2, 1), (4, 3, 6, 3)])
def test_as_many_are_encoded_ahead_as_are_sampled_together(
    max_in_flight: int, clips: int, before: int, beside: int
) -> None:
    """In the line there are `before` any is sampled, and `beside` those that are."""
    line = ReadyQueue(max_in_flight)
    line.set_batch_hint(clips)
    assert taken(line) == before
    assert line.pop() is not None
    assert len(line.take_matching(lambda _: True, clips - 1)) == clips - 1
    assert before - clips + taken(line) == beside


def test_the_first_leads_and_those_that_are_alike_join_in_their_order() -> None:
    line = ReadyQueue(8)
    line.set_batch_hint(4)
    for name in ("a1", "b1", "a2", "a3", "b2"):
        line.wait_for_room()
        line.push(job(name))
    leader: Any = line.pop()
    assert leader.name == "a1"
    joined: list[Any] = line.take_matching(lambda it: it.name.startswith("a"), 1)  # pyright: ignore[reportAttributeAccessIssue]
    assert [it.name for it in joined] == ["a2"]
    rest: list[Any] = [line.pop() for _ in range(3)]
    assert [it.name for it in rest] == ["b1", "a3", "b2"]
    line.end()
    assert line.pop() is None


def test_a_group_gathers_what_is_on_its_way_and_no_more() -> None:
    line = ReadyQueue(8)
    line.set_batch_hint(4)
    for _ in range(2):
        line.wait_for_room()
    found: list[int] = []
    gathering = threading.Thread(target=lambda: found.append(line.wait_for_matching(lambda _: True, 3)))
    gathering.start()
    line.push(job("one"))
    line.push(None)  # a job that has failed
    assert not found
    line.set_idle(True)
    gathering.join(30)
    assert found == [1]
