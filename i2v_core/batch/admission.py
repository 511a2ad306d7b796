"""Whether a stage may start: only when its predicted peak fits in what is free now. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..planning.plan import Stage
from ..units import format_gib

_LAST_STAGE_FIRST = {Stage.DECODE: 0, Stage.SAMPLE: 1, Stage.ENCODE: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """A device's memory: all of it, what others take, and what is to stay free."""

    total_bytes: int
    others_bytes: int = 0
    reserve_bytes: int = 0

    @property
    def ours_bytes(self) -> int:
        """What all stages together may take."""
        return max(0, self.total_bytes - self.others_bytes - self.reserve_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A stage that runs or wants to. `number` counts requests in the order in which they came; `since` is the number of
    the last that had come when this one was let in (of one that waits it says nothing).
    """

    job: int
    stage: Stage
    needed_bytes: int
    number: int
    since: int = 0

    @property
    def rank(self) -> tuple[int, int]:
        """Ascending: jobs that are nearly done first, so that what is begun gets done."""
        return (_LAST_STAGE_FIRST[self.stage], self.number)

    def __str__(self) -> str:
        return f"{self.stage.value} of job {self.job} ({format_gib(self.needed_bytes)})"


def what_it_waits_for(
    request: Request, running: Sequence[Request], waiting: Sequence[Request], room: Room
) -> str | None:
    """In words; None where the stage may start now.

    It may if it fits beside what runs, and takes no room from those that wait before it: each of them must fit beside
    it, and beside all that were let in since it came, once the others have ended.
    """
    free_bytes = room.ours_bytes - sum(it.needed_bytes for it in running)
    if request.needed_bytes > room.ours_bytes:
        return (
            f"{request} waits for other programs, which hold {format_gib(room.others_bytes)}: "
            f"{format_gib(room.ours_bytes)} are left"
        )
    if request.needed_bytes > free_bytes:
        return (
            f"{request} waits for {' and '.join(map(str, running))} to end: {format_gib(max(free_bytes, 0))} are free"
        )
    for before in waiting:
        if before.rank < request.rank and before.needed_bytes <= room.ours_bytes:
            beside = [it for it in running if it.since >= before.number]
            if before.needed_bytes + request.needed_bytes + sum(it.needed_bytes for it in beside) > room.ours_bytes:
                return f"{request} lets {before} go first"
    return None
